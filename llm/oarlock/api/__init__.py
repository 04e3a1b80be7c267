"""The functions of the Python interface, which `from oarlock import ...` gives."""

"""A process group for ranks on the CPUs of one machine."""

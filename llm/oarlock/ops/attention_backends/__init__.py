"""Ways to compute attention, from which oarlock.ops.attention.attend chooses."""

"""Parallelism: the plan and its rules, and what ranks do together."""

"""Who does what: ranks, groups, and what they carry."""

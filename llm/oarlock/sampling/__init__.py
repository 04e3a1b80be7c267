"""How the tokens of an answer are chosen: the declaration of all sampling parameters."""

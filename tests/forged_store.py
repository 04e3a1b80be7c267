"""A store whose content a test chooses (a value from Paddle's store once decided which file a rank wrote)."""

from __future__ import annotations


class ForgedStore:
    """Has the interface of Paddle's TCPStore; every key has the same content."""

    def __init__(self, content):
        self.content = content

    def add(self, key, number):
        return 1

    def set(self, key, value):
        pass

    def get(self, key):
        return self.content

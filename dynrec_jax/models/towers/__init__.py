"""Towers: the kinds of things that describe an item. A new kind is a module here and a name in `kinds.KINDS`."""

"""Colours that several kinds of objects share, BGR 0..255."""

BLACK, TYRE, GLASS = (18, 18, 18), (30, 28, 28), (70, 52, 38)
WHITE, LAMP, TAIL = (235, 235, 235), (235, 250, 255), (40, 30, 220)
SKIN, STEEL, ORANGE, RED = (130, 165, 215), (150, 150, 150), (20, 105, 245), (45, 40, 200)
YELLOW = (30, 185, 240)

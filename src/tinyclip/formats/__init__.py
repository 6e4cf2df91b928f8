"""How weights enter and leave: one file per outside world."""

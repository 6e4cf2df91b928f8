"""Learning from the teacher."""

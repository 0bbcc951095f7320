"""The command `doctor`: checks whether a machine or cluster is fit to train."""

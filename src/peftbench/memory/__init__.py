"""Before a run: how much memory it will take, from a rehearsal of its step that computes nothing."""

"""Ray Data: images become rows exactly once, on pools of actors, whatever is lost meanwhile."""

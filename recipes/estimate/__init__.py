"""How far the planner is off."""

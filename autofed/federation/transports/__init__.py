"""How requests reach sites and responses come back: in one process, or between machines over Flower."""

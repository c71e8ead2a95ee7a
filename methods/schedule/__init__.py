"""Schedules: the learning rate over the steps, as a factor of the optimizer's."""

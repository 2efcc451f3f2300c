"""Stages: the steps of the line, one file each, named after the step; `lowbit.pipeline` runs them in order."""

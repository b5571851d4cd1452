"""Metrics: scores of single images and of sets of images."""

"""Attacks on a plan's privacy, run by a site: canaries, label-only attack, inversion."""

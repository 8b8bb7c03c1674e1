"""Decisions as data; no tensor is read here."""

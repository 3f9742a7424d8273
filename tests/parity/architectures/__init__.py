"""Tiny random models of many architectures on real engines, one after another in a process of their own."""

"""Experiments: mitigations put in front of live traffic by the server itself, and read validly at every look.

definition → lifecycle → assignment → exposures, outcomes → measurements → sample → effect → analysis → safety, documents
"""

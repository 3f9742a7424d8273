"""What an operator has beside the service: where settings come from, what is wrong with this machine, logs and traces.

`commands` are `trimtab config` and `trimtab doctor`; `doctor` makes the checks; `logs` writes the log; `tracing` sends spans.
"""

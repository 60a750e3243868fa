"""What python -m lab.bench measures: functions from its options to the fields of a result."""

"""What bench.py measures: functions from its options to the fields of a result."""

"""Units of time, told apart by how large their numbers are."""

# Values below this say nothing about their unit: relative times count from 0, and 0 is a common filler.
UNIT_LESS = 10**8
# Upper bound of a time's magnitude by unit: seconds up to the year 5138, and finer units from 1973 on.
UNITS: dict[str, tuple[int, int]] = {
    "seconds": (10**11, 1),
    "milliseconds": (10**14, 10**3),
    "microseconds": (10**17, 10**6),
    "nanoseconds": (2**63, 10**9),
}

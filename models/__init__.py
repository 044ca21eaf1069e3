"""The science: data in, values or files under a given directory out. No orchestration here."""

"""Evidence: grids of problems, peers beside us, and the report that turns results/*.json into the docs' tables."""

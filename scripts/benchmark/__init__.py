"""The parts of scripts/bench: a scripted upstream, a load generator, gateways to compare, and the report."""

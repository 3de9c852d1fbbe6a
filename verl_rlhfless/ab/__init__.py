"""The comparison of arms: one recipe, run once per arm under the observer, nothing changed but appended overrides."""

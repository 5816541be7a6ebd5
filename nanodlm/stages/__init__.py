"""The table of stages, and running one: look up, else build; here or in a process of its own."""

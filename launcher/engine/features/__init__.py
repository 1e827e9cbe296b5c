"""A frozen backbone is computed once: what comes out of it is kept, and steps and validations begin there."""

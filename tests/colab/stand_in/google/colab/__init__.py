"""A stand-in for google.colab, which only Colab has: what this project and jax use of it.

The environment decides how it answers: STAND_IN_SECRETS, a JSON object of secrets; STAND_IN_DRIVE,
the folder that is the user's Drive (none: the user refuses); STAND_IN_RUNTIME, a file to write into
when the runtime is given back.
"""

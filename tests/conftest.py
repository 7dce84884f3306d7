"""No property has a deadline: on shared cores a call that takes a millisecond can take a quarter of a second."""

import importlib.util

if importlib.util.find_spec("hypothesis"):  # not where other people's packages are tested
    from hypothesis import settings

    settings.register_profile("patient", deadline=None)
    settings.load_profile("patient")

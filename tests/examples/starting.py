"""Scripts, started in the process of the tests."""


def start(main, *flags):
    """The exit status of a script that is started with these flags."""
    try:
        return main([str(flag) for flag in flags])
    except SystemExit as ended:  # of ``--help``
        return ended.code

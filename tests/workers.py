"""Which of the workers that run side by side a test goes to."""

_OF_ZOO = ("test_zoo", "test_as_cuda", "test_step", "test_verify")  # the last parameter of their tests is a case


def piece(nodeid: str) -> str:
    """The piece of work that a test belongs to, which one worker does.

    A file is one, so that what its tests share is made once. The tests over the zoo are one for each case: then what is
    compiled for a case and a layer is compiled by one worker alone.
    """
    file, _, test = nodeid.partition("::")
    if file.rpartition("/")[2].startswith(_OF_ZOO) and test.endswith("]"):
        return f"zoo: {test[:-1].partition('[')[2].rpartition('-')[2]}"
    return file

from gspo_moe.tasks.printing import Printed


def test_little_is_shown_as_it_comes() -> None:
    printed = Printed(20)
    assert (printed.take(b"one\n"), printed.take(b"two\n"), printed.end()) == (b"one\n", b"two\n", b"")


def test_of_much_the_beginning_and_the_end_are_shown_and_the_rest_is_counted() -> None:
    printed = Printed(20)
    assert printed.take(b"0123456789abc") == b"0123456789"
    assert [printed.take(b"x" * 1000) for _ in range(1000)] == [b""] * 1000
    assert printed.take(b"the end\n") == b""
    left_out = 3 + 1000 * 1000 + 8 - 10
    note = f"\n... {left_out} bytes that rewards printed are left out (task.reward.output_kb) ...\n"
    assert printed.end() == note.encode() + b"xxthe end\n"
    assert printed.take(b"again") == b"again", "begins anew"


def test_what_fits_the_two_halves_is_shown_whole() -> None:
    printed = Printed(20)
    assert printed.take(b"0123456789abcdefghij") + printed.end() == b"0123456789abcdefghij"

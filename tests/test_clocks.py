import numpy as np

from vqscale.data import clocks
from vqscale.data.clock_reader import UNREADABLE, read_clocks


def test_reader_reads_fresh_clocks() -> None:
    for size in (24, 32, 48):
        images, hours = clocks.draw(0, 600, size, seed=123)
        assert (read_clocks(images).hour == hours).mean() >= 0.99


def test_reader_measures_the_angles_and_the_rim() -> None:
    parameters = clocks.parameters(0, 300, seed=5)
    reading = read_clocks(clocks.render(parameters, 32))
    hour, minute = clocks.hand_angles(parameters.hour, parameters.minute)
    for measured, true in ((reading.hour_angle, hour), (reading.minute_angle, minute)):
        assert np.quantile(np.abs((measured - true + 180) % 360 - 180), 0.99) < 5
    assert np.abs(reading.centre / 32 - parameters.centre).max() < 0.03


def test_reader_fails_on_noise() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (500, 32, 32, 3), dtype=np.uint8)
    assert (read_clocks(noise).hour == UNREADABLE).mean() > 0.95


def test_reader_fails_on_swapped_labels() -> None:
    images, hours = clocks.draw(0, 600, 32, seed=9)
    assert (read_clocks(images).hour == (hours + 1) % 12).mean() < 0.02
    shuffled = np.random.default_rng(0).permutation(hours)
    assert (read_clocks(images).hour == shuffled).mean() < 0.15


def test_reader_fails_on_blank_faces() -> None:
    assert (read_clocks(np.full((5, 32, 32, 3), 200, np.uint8)).hour == UNREADABLE).all()


def test_a_clock_depends_on_seed_and_number_alone() -> None:
    images, hours = clocks.draw(0, 20, 32, seed=3)
    again, same = clocks.draw(7, 5, 32, seed=3)
    assert np.array_equal(images[7:12], again)
    assert np.array_equal(hours[7:12], same)
    assert not np.array_equal(images[0], clocks.draw(0, 1, 32, seed=4)[0][0])


def test_clocks_vary() -> None:
    many = clocks.parameters(0, 500, seed=0)
    assert len(np.unique(many.hour)) == 12
    assert np.ptp(many.radius) > 0.08
    assert np.ptp(many.centre[:, 0]) > 0.1
    for colour in (many.background, many.face, many.rim, many.hour_hand, many.minute_hand):
        assert colour.std(axis=0).max() > 0.04

"""Line charts as inline SVG that print well, and the data from which templates/charts.js redraws them.

The script shows values where the pointer is and redraws the curves over another axis. It only places and formats what
is made here: scales and ticks come with the data.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from nanochat.reporting.curves import Curve, metric_of
from nanochat.reporting.scales import Scale, horizontal_scales, tick_label, vertical_scale

HEIGHT, TOP, BOTTOM, LEFT = 176, 20, 36, 40  # of a chart and its margins, in the SVG's own units
WIDTH, RIGHT = 280, 8
NAMED_WIDTH, NAMED_RIGHT = 480, 106  # with the names of runs at the curves' ends
NAME_LENGTH, NAME_GAP = 13, 12  # letters of such a name, and the distance between two
STEEP_START = 20  # one part in so many of a curve that starts steeply is left out of the linear chart's range
MAX_DOTS = 40  # points of a curve that still get a dot each
AXIS_NAMES = {"step": "step", "tokens": "training tokens", "flops": "training FLOPs", "seconds": "training time"}


@dataclass(eq=False)
class Chart:
    """Curves of one metric in one frame, of one run or of several; a curve's place in `curves` gives its look."""

    key: str
    curves: Sequence[Curve | None]  # None: a run without it
    left_out: str = ""  # why curves of other runs are not shown
    number: int = 0  # its place in the page's data
    shown: list[Curve] = field(init=False)

    def __post_init__(self) -> None:
        self.shown = [curve for curve in self.curves if curve]
        self.metric = metric_of(self.key)
        self.title = self.shown[-1].title
        self.named = len(self.curves) > 1
        self.width, self.right = (NAMED_WIDTH, NAMED_RIGHT) if self.named else (WIDTH, RIGHT)
        common = [axis for axis in AXIS_NAMES if all(axis in curve.axes for curve in self.shown)]
        self.x = {axis: horizontal_scales([curve.axes[axis] for curve in self.shown], axis) for axis in common}
        self.y = self._vertical_scales()

    @property
    def caption(self) -> str:
        """`3.792, average of 49 steps`: the last value of a lone curve."""
        if self.named:
            return ""
        (curve,) = self.shown
        average = f", average of {curve.averaged} steps" if curve.averaged > 1 else ""
        return self.format(curve.last) + average

    def format(self, value: float) -> str:
        """The value in the chart's unit, to four digits."""
        return tick_label(float(f"{value:.4g}"), self.y[0].unit)

    def _vertical_scales(self) -> list[Scale]:
        """[for a linear horizontal axis, for a logarithmic one]: the former leaves out a steep start."""
        unit = "share" if self.metric.range == "share" else ""
        everything = [value for curve in self.shown for value in curve_values(curve, 0)]
        late = [value for curve in self.shown for value in curve_values(curve, len(curve.values) // STEEP_START)]
        zero = self.metric.range == "zero"
        return [vertical_scale(late, unit, zero), vertical_scale(everything, unit, zero)]

    def data(self) -> dict[str, Any]:
        """What charts.js needs, as JSON values; the index of `x` and `y` is 1 for a logarithmic horizontal axis."""
        return {
            "unit": self.y[0].unit,
            "frame": [LEFT, TOP, self.width - LEFT - self.right, HEIGHT - TOP - BOTTOM],
            "gap": NAME_GAP,
            "x": {axis: [scale_data(scale) for scale in scales] for axis, scales in self.x.items()},
            "y": [scale_data(scale) for scale in self.y],
            "lines": [
                {
                    "axes": {axis: rounded(points) for axis, points in curve.axes.items()},
                    "values": rounded(curve.values),
                    "smooth": rounded(curve.smooth),
                }
                for curve in self.shown
            ],
        }

    def svg(self) -> Markup:
        """The chart over steps."""
        frame = (LEFT, TOP, self.width - LEFT - self.right, HEIGHT - TOP - BOTTOM)
        x, y = self.x["step"][0], self.y[0]
        parts = [y_ticks(y, *frame), x_ticks(x, *frame), self._unit(), x_name(AXIS_NAMES["step"], *frame)]
        parts += [clip(*frame)]
        parts += [self._line(*line, x, y) for line in self._placed()]
        parts += [Markup("</svg>"), self._names(frame) if self.named else Markup()]
        label = f"{self.title}: {self.format(self.shown[0].values[0])} to {self.format(self.shown[0].values[-1])}"
        opening = Markup('<svg class="chart" role="img" aria-label="{}" viewBox="0 0 {} {}" data-chart="{}">')
        return opening.format(label, self.width, HEIGHT, self.number) + Markup().join(parts) + Markup("</svg>")

    def _unit(self) -> Markup:
        return Markup('<text class="unit" x="0" y="11">{}</text>').format(self.metric.unit)

    def _line(self, place: int, curve: Curve, x: Scale, y: Scale) -> Markup:
        """The paths of one curve: pale and bold, or bold alone, with dots where there are few points."""
        bold, width, height = curve.smooth or curve.values, self.width - LEFT - self.right, HEIGHT - TOP - BOTTOM

        def path(kind: str, values: Sequence[float], joint: str = "L") -> Markup:
            points = (
                f"{width * x.position(step):.5g} {height * (1 - y.position(value)):.5g}"
                for step, value in zip(curve.steps, values)
            )
            text = "M" + joint.join(points) if joint == "L" else "".join(f"M{point}h0" for point in points)
            shape = '<path class="{} s{}" data-line="{}" d="{}"/>'
            return Markup(shape).format(kind, place, self.shown.index(curve), text)

        drawn = path("bold", bold)
        if curve.smooth and not self.named:
            drawn = path("pale", curve.values) + drawn
        return drawn + path("dots", bold, "M") if len(bold) <= MAX_DOTS else drawn

    def _names(self, frame: tuple[int, int, int, int]) -> Markup:
        """The name of each run where its curve ends."""
        left, top, width, height = frame
        ends = [top + height * (1 - min(1.0, max(0.0, self.y[0].position(curve.last)))) for curve in self.shown]
        shape = '<text class="name s{}" x="{}" y="{:.1f}">{}</text>'
        places = spread(ends, top + 4, top + height)
        return Markup().join(
            Markup(shape).format(place, left + width + 5, y + 4, shorten(curve.run))
            for (place, curve), y in zip(self._placed(), places)
        )

    def _placed(self) -> list[tuple[int, Curve]]:
        """(place in `curves`, curve) of those that are shown."""
        return [(place, curve) for place, curve in enumerate(self.curves) if curve]


def shorten(name: str) -> str:
    return name if len(name) <= NAME_LENGTH else name[: NAME_LENGTH - 1] + "…"


def curve_values(curve: Curve, start: int) -> list[float]:
    """All values drawn from the point `start` on."""
    return [*curve.values[start:], *curve.smooth[start:]]


def spread(places: Sequence[float], low: float, high: float) -> list[float]:
    """The places moved apart to NAME_GAP, in their order; within [low, high] if they fit."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    moved, at = list(places), low - NAME_GAP
    for i in order:
        at = moved[i] = max(places[i], at + NAME_GAP)
    at = high + NAME_GAP
    for i in reversed(order):
        at = moved[i] = min(moved[i], at - NAME_GAP)
    return moved


def y_ticks(scale: Scale, left: float, top: float, width: float, height: float) -> Markup:
    """Horizontal lines with their labels."""
    shape = '<path d="M{} {:.1f}h{}"/><text class="end" x="{}" y="{:.1f}">{}</text>'
    drawn = (
        Markup(shape).format(left, y, width, left - 5, y + 4, text)
        for value, text in scale.ticks()
        for y in [top + height * (1 - scale.position(value))]
    )
    return Markup('<g class="y">') + Markup().join(drawn) + Markup("</g>")


def x_ticks(scale: Scale, left: float, top: float, width: float, height: float) -> Markup:
    """Labels below the frame, with a short line each."""
    shape = '<path d="M{:.1f} {}v4"/><text class="middle" x="{:.1f}" y="{}">{}</text>'
    drawn = (
        Markup(shape).format(x, top + height, x, top + height + 15, text)
        for value, text in scale.ticks()
        for x in [left + width * scale.position(value)]
    )
    return (
        Markup('<g class="x"><path d="M{} {}h{}"/>').format(left, top + height, width)
        + Markup().join(drawn)
        + Markup("</g>")
    )


def clip(left: float, top: float, width: float, height: float, margin: int = 3) -> Markup:
    """The opening of what is cut off outside the frame, but for a line along its edge. Inside, (0, 0) is its corner."""
    outer = (left - margin, top - margin, width + 2 * margin, height + 2 * margin)
    inner = (-margin, -margin, *outer[2:])
    shape = '<svg class="frame" x="{}" y="{}" width="{}" height="{}" viewBox="{} {} {} {}">'
    return Markup(shape).format(*outer, *inner)


def x_name(name: str, left: float, top: float, width: float, height: float) -> Markup:
    shape = '<text class="axis middle" x="{:.1f}" y="{}">{}</text>'
    return Markup(shape).format(left + width / 2, top + height + 31, name)


def scale_data(scale: Scale) -> dict[str, Any]:
    return {"low": scale.low, "high": scale.high, "log": scale.log, "ticks": scale.ticks()}


def rounded(values: Sequence[float]) -> list[float]:
    """To five digits, whole numbers as integers: short in JSON."""
    return [int(value) if value.is_integer() else value for value in (float(f"{value:.5g}") for value in values)]

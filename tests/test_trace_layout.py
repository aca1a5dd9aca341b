"""Symbolic axes: the algebra against real index arithmetic, each rule alone, and layouts of hand-written models."""

from __future__ import annotations

import math

import einops
import pytest
import torch
import torch.nn.functional as F
from graph_recorder import shown, traced_output
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lvsa_compile.axes import rules
from lvsa_compile.axes.algebra import INPUT, LOST, Concat, Factor, Source, axis_of, axis_size, concat, regroup, slice_axis
from lvsa_compile.axes.combining import combine
from lvsa_compile.axes.opaque import expanded, substituted

# --- the algebra, against labels that go through the same operations --------------------------------------------------------


def labels_of(axis, labels: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """For each source axis the coordinate every element of ``axis`` claims to have there (-1: no claim)."""
    if not axis:
        return {name: torch.full((1,), -1) for name in labels}
    first, rest = axis[0], axis[1:]
    if isinstance(first, Concat):
        heads = [labels_of(part, labels) for part in first.parts]
        head = {name: torch.cat([h[name] for h in heads]) for name in labels}
    else:
        head = {name: torch.full((first.size,), -1) for name in labels}
        for digit in first.digits:
            head[digit.source.name] = (digit.start + torch.arange(digit.size)) * digit.stride
    tail = labels_of(rest, labels)
    out = {}
    for name in labels:
        a, b = head[name][:, None], tail[name][None, :]
        out[name] = torch.where(a < 0, b.expand(len(a), -1), torch.where(b < 0, a, a + b)).flatten()
    return out


@settings(max_examples=200)
@given(data=st.data())
def test_axes_follow_reshapes_permutes_slices_and_joins(data):
    """Coordinates claimed by the algebra are those of tensors of coordinates put through the same operations."""
    sizes = data.draw(st.lists(st.sampled_from([2, 3, 4, 6]), min_size=2, max_size=4))
    names = [f"s{i}" for i in range(len(sizes))]
    axes = tuple(axis_of(Source("input", name, 0, size)) for name, size in zip(names, sizes, strict=True))
    labels = {
        name: torch.arange(size).view([-1 if i == k else 1 for k in range(len(sizes))]).expand(sizes)
        for i, (name, size) in enumerate(zip(names, sizes, strict=True))
    }
    for _ in range(data.draw(st.integers(1, 6))):
        shape = list(next(iter(labels.values())).shape)
        what = data.draw(st.sampled_from(["permute", "merge", "split", "slice", "cat"]))
        dim = data.draw(st.integers(0, len(shape) - 1))
        if what == "permute":
            order = data.draw(st.permutations(range(len(shape))))
            axes, labels = tuple(axes[i] for i in order), {n: t.permute(order) for n, t in labels.items()}
        elif what in ("merge", "split"):
            if what == "merge":
                assume(dim + 1 < len(shape))
                new = [*shape[:dim], shape[dim] * shape[dim + 1], *shape[dim + 2 :]]
            else:
                divisors = [d for d in range(2, shape[dim]) if shape[dim] % d == 0]
                assume(divisors)
                outer = data.draw(st.sampled_from(divisors))
                new = [*shape[:dim], outer, shape[dim] // outer, *shape[dim + 1 :]]
            grouped = regroup(axes, new)
            if grouped is None:
                return  # the algebra may give up, never be wrong
            axes, labels = grouped, {n: t.reshape(new) for n, t in labels.items()}
        else:
            start = data.draw(st.integers(0, shape[dim] - 1))
            stop = data.draw(st.integers(start + 1, shape[dim]))
            pieces = [slice_axis(axes[dim], a, b) for a, b in ((0, start), (start, stop))] if start else [slice_axis(axes[dim], 0, stop)]
            if any(piece is None for piece in pieces):
                return
            if what == "slice":
                axes = (*axes[:dim], pieces[-1], *axes[dim + 1 :])
                labels = {n: t.narrow(dim, start, stop - start) for n, t in labels.items()}
            else:  # swap the two pieces, or join them again
                swap = data.draw(st.booleans())
                axes = (*axes[:dim], concat(pieces[::-1] if swap else pieces), *axes[dim + 1 :])
                parts = {n: [t.narrow(dim, 0, start), t.narrow(dim, start, stop - start)] for n, t in labels.items()}
                labels = {n: torch.cat(p[::-1] if swap else p, dim) for n, p in parts.items()}
    shape = next(iter(labels.values())).shape
    assert [axis_size(axis) for axis in axes] == list(shape)
    for dim, axis in enumerate(axes):
        for name, claimed in labels_of(axis, labels).items():
            moved = labels[name].movedim(dim, 0).reshape(shape[dim], -1)
            if bool((claimed < 0).any()) or any(isinstance(f, Concat) for f in axis[1:]):
                continue
            changes = moved - moved[:1]  # what this axis alone adds to the coordinate; a dropped first slice adds a constant
            assert torch.equal(changes, (claimed - claimed[0])[:, None].expand_as(changes)), (name, shown(axis))


def test_combine_refines_an_opaque_axis_by_a_product():
    whole = axis_of(Source("input", "packed", 1, 24))
    product = (*axis_of(Source("arange", "f", 0, 2)), *axis_of(Source("arange", "h", 0, 3)), *axis_of(Source("arange", "w", 0, 4)))
    combined = combine(whole, product)
    assert [factor.size for factor in combined] == [2, 3, 4]
    assert all({"input", "arange"} == factor.kinds for factor in combined)
    assert combine(product, whole) == combined


def test_slices_that_touch_join_again_and_empty_ones_vanish():
    axis = axis_of(Source("input", "x", 0, 9))
    assert concat([slice_axis(axis, 0, 4), slice_axis(axis, 4, 9)]) == axis
    assert concat([axis, axis_of(Source("created", "zeros", 0, 0))]) == axis
    assert isinstance(concat([slice_axis(axis, 4, 9), slice_axis(axis, 0, 4)])[0], Concat)


def test_neighbouring_digits_merge_only_where_all_sources_agree():
    axis = axis_of(Source("input", "x", 0, 24))
    (split,) = regroup((axis,), [24])
    assert split == axis
    assert regroup(regroup((axis,), [4, 6]), [24]) == (axis,)
    assert all(isinstance(factor, Factor) for factor in regroup((axis,), [2, 12])[1])


# --- each rule ----------------------------------------------------------------------------------------------------------------

X = torch.zeros(2, 4, 6, 8)
TEXT = torch.zeros(2, 5, 8)


def written_over(x):
    out = torch.empty_like(x)
    out[..., 0::2] = x[..., 0::2]
    out[..., 1::2] = -x[..., 1::2]
    return out


def part_written_over(x, text):
    joint = torch.cat([text, x.flatten(1, 2)], 1)
    joint[:, 5:] = joint[:, 5:] * 2
    return joint


def written_place_by_place(x):
    out = torch.empty_like(x)
    for i in range(4):
        out[:, i] = x[:, i] * 2
    return out


BACKWARDS = "x.1[3:4] | x.1[2:3] | x.1[1:2] | x.1%1"


def placed_by_index(x):
    out = x.new_zeros(2, 30, 8)
    out[:, torch.arange(6, 30)] = x.flatten(1, 2)
    return out


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x.flatten(1, 2), ["x.0", "x.1*x.2", "x.3"]),
        (lambda x: x.permute(0, 2, 1, 3).reshape(2, 24, 8), ["x.0", "x.2*x.1", "x.3"]),
        (lambda x: x.flatten(0, 2).unflatten(0, (8, 6)), ["x.0*x.1", "x.2", "x.3"]),
        (lambda x: x.reshape(2, 4, 3, 2, 8), ["x.0", "x.1", "x.2/2", "x.2%2", "x.3"]),
        (lambda x: x.reshape(2, 24, 8)[:, 6:18], ["x.0", "x.1[1:3]*x.2", "x.3"]),
        (lambda x: einops.rearrange(x, "b f (h p) c -> (b f) (p h) c", p=3), ["x.0*x.1", "x.2%3*x.2/3", "x.3"]),
        (lambda x: x.chunk(2, 1)[1], ["x.0", "x.1[2:4]", "x.2", "x.3"]),
        (lambda x: torch.cat(x.split([1, 3], 1), 1), ["x.0", "x.1", "x.2", "x.3"]),
        (lambda x: torch.cat(x.split([2, 2], 1), 1), ["x.0", "x.1", "x.2", "x.3"]),
        (lambda x: x.unbind(1)[2], ["x.0", "x.1[2:3]*x.2", "x.3"]),
        (lambda x: torch.stack(x.unbind(1), 1), ["x.0", "x.1", "x.2", "x.3"]),
        (lambda x: torch.stack([x[:, :, i] * 2 for i in range(6)], 3), ["x.0", "x.1", "x.3", "x.2"]),
        (lambda x: torch.stack(x.unbind(1)[::-1], 1), ["x.0", "?stack", "x.2", "x.3"]),
        (lambda x: torch.cat([x[:, i].flatten(1, 2) for i in range(4)], 1), ["x.0", "x.1*x.2*x.3"]),
        (written_place_by_place, ["x.0", "x.1", "x.2", "x.3"]),
        (lambda x: x.mean(1), ["x.0", "x.2", "x.3"]),
        (lambda x: x.mean(1, keepdim=True), ["x.0", "1", "x.2", "x.3"]),
        (lambda x: F.layer_norm(x, (8,)), ["x.0", "x.1", "x.2", "x.3"]),
        (lambda x: F.rms_norm(x, (8,)), ["x.0", "x.1", "x.2", "x.3"]),
        (lambda x: x.softmax(2), ["x.0", "x.1", "x.2", "x.3"]),
        (lambda x: x.to(torch.bfloat16).contiguous() + 1, ["x.0", "x.1", "x.2", "x.3"]),
        (lambda x: x[:, None].expand(2, 3, 4, 6, 8).flatten(1, 2), ["x.0", "broadcast*x.1", "x.2", "x.3"]),
        (lambda x: torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)))).flatten(3), ["x.0", "x.1", "x.2", "x.3/2*created"]),
        (lambda x: x.flip(1), ["x.0", "?flip", "x.2", "x.3"]),
        (lambda x: x.roll(1, 1), ["x.0", "?roll", "x.2", "x.3"]),
        (lambda x: x[:, torch.tensor([2, 1, 0, 3])], ["x.0", "(x.1[2:3] | x.1[1:2] | x.1%1 | x.1[3:4])", "x.2", "x.3"]),
        (lambda x: x[:, torch.arange(4) + 0], ["x.0", "x.1", "x.2", "x.3"]),
        (lambda x: x[:, x[0, :, 0, 0].argsort()], ["x.0", "?index", "x.2", "x.3"]),
        (lambda x: x.index_select(2, torch.tensor([2, 3, 4, 5])), ["x.0", "x.1", "x.2[2:6]", "x.3"]),
        (lambda x: x.new_zeros(2, 9, 6, 8).index_copy(1, torch.arange(4) + 5, x), ["x.0", "(created | x.1)", "x.2", "x.3"]),
        (
            lambda x: x.new_zeros(2, 4, 6, 8).index_add(1, torch.tensor([3, 2, 1, 0]), x),
            ["x.0", "(x.1[3:4] | x.1[2:3] | x.1[1:2] | x.1%1)", "x.2", "x.3"],
        ),
        (lambda x: x.scatter_add(1, torch.arange(4)[None, :, None, None].expand(2, 4, 6, 8), x * 2), ["x.0", "x.1", "x.2", "x.3"]),
        (placed_by_index, ["x.0", "(created | x.1*x.2)", "x.3"]),
        (lambda x: F.pad(x, (0, 0, 0, 2)), ["x.0", "x.1", "(x.2 | created)", "x.3"]),
        (lambda x: torch.einsum("bfhc,dc->bfhd", x, torch.ones(3, 8)), ["x.0", "x.1", "x.2", "created"]),
        (lambda x: F.conv2d(x, torch.ones(5, 4, 2, 2), stride=2), ["x.0", "created", "x.2/2", "x.3/2"]),
        (lambda x: F.conv2d(x, torch.ones(5, 4, 3, 3), padding=1), ["x.0", "created", "x.2", "x.3"]),
        (lambda x: F.conv2d(x, torch.ones(5, 4, 4, 4), stride=2, padding=1), ["x.0", "created", "x.2/2", "x.3/2"]),
        (lambda x: F.conv2d(F.pad(x, (1, 1, 1, 1)), torch.ones(5, 4, 3, 3)), ["x.0", "created", "x.2", "x.3"]),
        (lambda x: F.conv2d(F.pad(x, (2, 0, 2, 0)), torch.ones(5, 4, 3, 3)), ["x.0", "created", "x.2", "x.3"]),
        (lambda x: F.avg_pool2d(x, 2), ["x.0", "x.1", "x.2/2", "x.3/2"]),
        (lambda x: F.pixel_unshuffle(x, 2), ["x.0", "?pixel_unshuffle", "x.2/2", "x.3/2"]),
        (lambda x: F.pixel_shuffle(x, 2), ["x.0", "1", "x.2*created", "x.3*created"]),
        (lambda x: x.unfold(2, 2, 2).unfold(3, 4, 4), ["x.0", "x.1", "x.2/2", "x.3/4", "x.2%2", "x.3%4"]),
        (lambda x: F.unfold(x, 2, stride=2), ["x.0", "?im2col", "x.2/2*x.3/2"]),
        (lambda x: F.fold(F.unfold(x, 2, stride=2), (6, 8), 2, stride=2), ["x.0", "?col2im", "x.2/2*created", "x.3/2*created"]),
        (lambda x: torch.polar(x, x * 2).abs(), ["x.0", "x.1", "x.2", "x.3"]),
        (lambda x: torch.slice_scatter(x, x[:, 1:3] * 2, 1, 1, 3), ["x.0", "x.1", "x.2", "x.3"]),
        (lambda x: torch.select_scatter(x, x[:, 1] * 2, 1, 1), ["x.0", "x.1", "x.2", "x.3"]),
        (lambda x: torch.take_along_dim(x, x.argsort(2), 2), ["x.0", "x.1", "?gather", "x.3"]),
        (lambda x: F.scaled_dot_product_attention(x, x, x), ["x.0", "x.1", "x.2", "x.3"]),
        (written_over, ["x.0", "x.1", "x.2", "?setitem"]),
    ],
)
def test_each_rule_alone(function, expected):
    def named(x):
        return function(x)

    assert [shown(axis) for axis in traced_output(named, X)] == expected


def test_joint_sequences_and_writing_to_a_part_of_them():
    def joint(x, text):
        return torch.cat([x.flatten(1, 2), text], 1).flatten(0, 1).unflatten(0, (2, -1))

    assert [shown(a) for a in traced_output(joint, X, TEXT)] == ["text.0=x.0", "(x.1*x.2 | text.1)", "text.2=x.3"]
    assert [shown(a) for a in traced_output(part_written_over, X, TEXT)] == ["text.0=x.0", "(text.1 | x.1*x.2)", "text.2=x.3"]
    assert [shown(a) for a in traced_output(lambda x, text: joint(x, text)[:, 24:], X, TEXT)] == ["text.0=x.0", "text.1", "text.2=x.3"]


def test_symbolic_sizes_are_followed_without_guards():
    def tokens(x, text):
        return torch.cat([x.flatten(1, 2), text], 1)[:, : x.shape[1] * x.shape[2]].unflatten(1, (x.shape[1], -1))

    axes = traced_output(tokens, torch.zeros(2, 5, 6, 8), TEXT, dynamic=True)
    assert [shown(a) for a in axes] == ["text.0=x.0", "x.1", "x.2", "text.2=x.3"]


def test_a_rope_table_of_aranges_shows_the_grid_of_packed_tokens():
    def packed(x):
        grid = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(3), torch.arange(4), indexing="ij"))
        return x * grid.flatten(1).float().sum(0)[:, None]

    (axis,) = traced_output(packed, torch.zeros(1, 24, 8))[1:2]
    assert [factor.size for factor in axis] == [2, 3, 4]
    assert math.prod(len(factor.kinds) for factor in axis) == 8


def test_every_rule_is_of_an_op_that_there_is():
    from lvsa_compile.ops import attention  # noqa: F401 - defines ops
    from lvsa_compile.patterns import library_ops

    for name in rules.RULES:
        known = any(hasattr(getattr(torch.ops, namespace), name) for namespace in ("aten", "lvsa", "_c10d_functional"))
        assert known or name.startswith("npu.") or name in library_ops.LAYOUTS, name


def test_an_axis_that_was_turned_around_is_that_of_what_a_graph_was_given():
    inside = axis_of(Source(INPUT, "x", 1, 12, "a", 3))
    turned = axis_of(Source(LOST, "flip", 1, 12, "flip", origins=frozenset({"a"}), stands_for_axis=inside))
    own = axis_of(Source(INPUT, "latents", 2, 12, "b", 5))
    ((factor,),) = substituted((turned,), {"a": ((), own, ())})
    (digit,) = factor.digits
    assert digit.source.origins == {"b"}
    assert expanded(digit.source.stands_for_axis) == own

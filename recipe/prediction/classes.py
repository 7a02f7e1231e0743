"""Class list → each query's probability of each class, from the caption decoder's likelihood of the class phrases.

The phrases form a trie of tokens, each ending with end-of-sequence. A phrase has the product of the probabilities along
its path, and a node's are normalised over its children alone, so those of all phrases sum to 1. Every query reads the
whole trie in one pass, in which a node sees only its ancestors.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from recipe.config import DATA_CLASSES, ConfigError
from recipe.metrics.gather import normalized_caption
from recipe.models.caption_decoder import CaptionDecoder, TokenTree
from recipe.models.network import JointNetwork
from recipe.schema import CaptionPlaces, Memory

LEAST_SHARE = 0.01  # probability of a class that an object keeps


@dataclass(frozen=True)
class ClassTrie:
    """The phrases of K classes.

    Attributes:
        names: The classes, K of them.
        tree: The nodes at which phrases part, with their ancestors; the first is the root, before any token.
        edges: (E, 3) int64, the children of such nodes: node, token that leads on, group. Groups number the nodes with
            several children from 0; an only child has the probability 1 and is not listed.
        paths: (K, E) bool, the edges of each class.
    """

    names: tuple[str, ...]
    tree: TokenTree
    edges: Tensor
    paths: Tensor

    def to(self, device: torch.device) -> "ClassTrie":
        """Return the trie with its tensors on a device."""
        tree = TokenTree(*(getattr(self.tree, name).to(device) for name in ("tokens", "depths", "mask")))
        return ClassTrie(self.names, tree, self.edges.to(device), self.paths.to(device))

    def most_probable(self, shares: Sequence[float]) -> tuple[tuple[str, float], ...]:
        """Return (class, probability) of the best class and of all of at least `LEAST_SHARE`, best first."""
        ranked = sorted(zip(self.names, shares, strict=True), key=lambda pair: -pair[1])
        return (ranked[0], *(pair for pair in ranked[1:] if pair[1] >= LEAST_SHARE))


def build_trie(names: Sequence[str], tokenizer: PreTrainedTokenizerBase, eos_token_id: int, longest: int) -> ClassTrie:
    """Return the trie of class names, tokenized as captions are.

    Raises:
        ValueError: There are fewer than two, two are equal without case and outer blanks, or one is empty or longer
            than `longest` tokens with end-of-sequence.
    """
    names = tuple(name.strip() for name in names)
    if len(names) < 2:
        raise ValueError(f"{len(names)} classes leave no choice: give two or more")
    forms: dict[str, str] = {}
    for name in names:
        form = normalized_caption(name)
        if not form:
            raise ValueError("a class has an empty name")
        if form in forms:
            raise ValueError(f"the classes {forms[form]!r} and {name!r} are the same: leave one out")
        forms[form] = name
    phrases: list[tuple[int, ...]] = []
    for name in names:
        ids: list[int] = tokenizer(name, add_special_tokens=False)["input_ids"]  # pyright: ignore[reportAssignmentType]
        phrases.append((*ids, eos_token_id))
        if len(phrases[-1]) > longest:
            raise ValueError(
                f"the class {name!r} has {len(phrases[-1])} tokens with end-of-sequence, the head writes at most "
                f"{longest} (caption_decoder.max_caption_tokens): give a shorter name, or leave it out"
            )
    children: dict[tuple[int, ...], dict[int, None]] = {}
    for phrase in phrases:
        for length, token in enumerate(phrase):
            children.setdefault(phrase[:length], {})[token] = None
    parting = [prefix for prefix, tokens in children.items() if len(tokens) > 1]
    nodes = sorted({prefix[:length] for prefix in parting for length in range(len(prefix) + 1)}, key=len) or [()]
    number = {prefix: index for index, prefix in enumerate(nodes)}
    is_ancestor = [[node[: len(other)] == other for other in nodes] for node in nodes]
    edges = [(number[prefix], token, group) for group, prefix in enumerate(parting) for token in children[prefix]]
    paths = [
        [phrase[: len(nodes[node]) + 1] == (*nodes[node], token) for node, token, _ in edges] for phrase in phrases
    ]
    tree = TokenTree(
        tokens=torch.tensor([prefix[-1] for prefix in nodes[1:]], dtype=torch.int64),
        depths=torch.tensor([len(prefix) for prefix in nodes], dtype=torch.int64),
        mask=torch.tensor(is_ancestor),
    )
    return ClassTrie(names, tree, torch.tensor(edges), torch.tensor(paths))


def class_trie(names: Sequence[str], tokenizer: PreTrainedTokenizerBase, network: JointNetwork) -> ClassTrie | None:
    """Return the trie of `evaluation.classes` for a network; None without classes.

    Raises:
        ConfigError: The network has no head, or as `build_trie`.
    """
    if not names:
        return None
    if list(names) == DATA_CLASSES:
        raise ConfigError("evaluation.classes is data, but no training set is at hand: give the names, as --classes")
    if not network.has_head:
        raise ConfigError("evaluation.classes needs a detection head: leave it out, or detection_head: null")
    assert isinstance(tokenizer.eos_token_id, int) and network.max_caption_tokens is not None
    try:
        return build_trie(names, tokenizer, tokenizer.eos_token_id, network.max_caption_tokens)
    except ValueError as error:
        raise ConfigError(f"evaluation.classes: {error}") from error


@torch.no_grad()
def class_probabilities(
    decoder: CaptionDecoder,
    trie: ClassTrie,
    query_features: Tensor,
    boxes: Tensor,
    places: CaptionPlaces,
    memory: Memory,
    embed: Callable[[Tensor], Tensor],
    token_logits: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Return the probability of each of K classes for R queries: (R, K), float32 at least, rows sum to 1.

    Args:
        decoder: The caption decoder.
        trie: On the device of the queries.
        query_features: (R, W).
        boxes: (R, 4) cxcywh, relative to the image.
        places: Of the queries.
        memory: Of the N images.
        embed: Token ids → (..., D).
        token_logits: (R, D), (T,) token ids → (R, T), the columns of the logits that belong to these tokens.
    """
    tree = trie.tree
    embeds = embed(tree.tokens)[None].expand(len(query_features), -1, -1)
    states = decoder(query_features, boxes, places, memory, embeds, tree=tree)  # (R, nodes, D)
    nodes, tokens, groups = trie.edges.unbind(1)
    dtype = torch.promote_types(states.dtype, torch.float32)
    log_likelihoods = states.new_zeros(len(states), len(trie.names), dtype=dtype)
    for group in range(int(groups[-1]) + 1):
        edges = (groups == group).nonzero().squeeze(1)
        logits = token_logits(states[:, nodes[edges[0]]], tokens[edges]).to(dtype)
        log_likelihoods += logits.log_softmax(-1) @ trie.paths[:, edges].T.to(dtype)
    return log_likelihoods.exp()

"""PyTorch's side: Hugging Face transformers' Llama and Qwen3-Next (dense ffn) with AdamW."""

from collections.abc import Callable

import shapes
import torch
import transformers


def build(case: shapes.Case) -> tuple[Callable[[], None], int]:
    """A function that makes one step, and the number of parameters."""
    torch.manual_seed(0)
    model = {"llama": _llama, "hybrid": _qwen3_next}[case.model]()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
    tokens = torch.randint(0, shapes.VOCAB, (case.rows, case.seq_len))
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=case.dtype == "bfloat16")

    def one() -> None:
        with autocast:
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return one, sum(parameter.numel() for parameter in model.parameters())


def _llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_common()))


def _qwen3_next():
    settings = transformers.Qwen3NextConfig(
        **_common(),
        head_dim=shapes.HEAD_DIM,
        linear_num_key_heads=shapes.HEADS,
        linear_num_value_heads=shapes.HEADS,
        linear_key_head_dim=shapes.HEAD_DIM,
        linear_value_head_dim=shapes.HEAD_DIM,
        full_attention_interval=4,
        num_experts=0,
        mlp_only_layers=list(range(shapes.DEPTH)),
    )
    return transformers.Qwen3NextForCausalLM(settings)


def _common() -> dict:
    return dict(
        hidden_size=shapes.WIDTH,
        intermediate_size=shapes.HIDDEN,
        num_hidden_layers=shapes.DEPTH,
        num_attention_heads=shapes.HEADS,
        num_key_value_heads=shapes.HEADS,
        vocab_size=shapes.VOCAB,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )

"""A GGUF file as llama.cpp has it: a Llama of two layers with a tokenizer of letters, its numbers given."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

LETTERS = ["<unk>", "<s>", "</s>", *"abcdefghij", "Ġ", "ab"]
_NAMES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
          "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
          "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
_OTHERS = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
           "lm_head.weight": "output.weight"}


def llama() -> LlamaForCausalLM:
    config = LlamaConfig(vocab_size=len(LETTERS), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def write(path: Path, model: LlamaForCausalLM) -> None:
    from gguf import GGUFWriter

    config, file = model.config, GGUFWriter(path, "llama")
    file.add_context_length(64)
    file.add_embedding_length(config.hidden_size)
    file.add_feed_forward_length(config.intermediate_size)
    file.add_block_count(config.num_hidden_layers)
    file.add_head_count(config.num_attention_heads)
    file.add_head_count_kv(config.num_key_value_heads)
    file.add_layer_norm_rms_eps(config.rms_norm_eps)
    file.add_rope_freq_base(10000.0)
    file.add_vocab_size(len(LETTERS))
    file.add_tokenizer_model("gpt2")
    file.add_token_list(LETTERS)
    file.add_token_merges(["a b"])
    file.add_unk_token_id(0)
    file.add_bos_token_id(1)
    file.add_eos_token_id(2)
    for name, tensor in model.state_dict().items():
        file.add_tensor(_named(name), _ordered(name, tensor, config).contiguous().numpy())
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


def _named(name: str) -> str:
    if name in _OTHERS:
        return _OTHERS[name]
    _, _, index, inner = name.removesuffix(".weight").split(".", 3)
    return f"blk.{index}.{_NAMES[inner]}.weight"


def _ordered(name: str, tensor: torch.Tensor, config: LlamaConfig) -> torch.Tensor:
    """llama.cpp turns the pairs of a head's outputs that stand beside each other, transformers those half a head
    apart."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return tensor
    return tensor.reshape(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)

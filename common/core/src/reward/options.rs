//! Options of reward functions, as configurations and requests hold them.

use std::sync::Arc;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::Judge;
use crate::nearest::hint;

/// A judge without options.
pub(super) fn none<J: Judge + Default + 'static>(options: Map<String, Value>) -> Result<Arc<dyn Judge>, String> {
    match options.keys().next() {
        None => Ok(Arc::new(J::default())),
        Some(option) => Err(format!("there is no option {option:?}; it has none")),
    }
}

/// A judge that is its own options, each with a default.
pub(super) fn parsed<J>(options: Map<String, Value>) -> Result<Arc<dyn Judge>, String>
where
    J: Judge + Default + Serialize + DeserializeOwned + 'static,
{
    Ok(Arc::new(parse::<J>(options)?))
}

/// Reads options into a struct whose every field has a default.
pub(super) fn parse<O: Default + Serialize + DeserializeOwned>(options: Map<String, Value>) -> Result<O, String> {
    let known = match serde_json::to_value(O::default()) {
        Ok(Value::Object(known)) => known,
        _ => Map::new(),
    };
    if let Some(option) = options.keys().find(|option| !known.contains_key(*option)) {
        let names: Vec<&str> = known.keys().map(String::as_str).collect();
        let hint = hint(option, names.iter().copied());
        return Err(format!("there is no option {option:?}{hint}; there are {}", names.join(", ")));
    }
    serde_path_to_error::deserialize(Value::Object(options)).map_err(|error| error.to_string())
}

//! "Did you mean": the known name closest to a misspelt one.

/// Longest text, in bytes, that is compared: what that takes grows with the product of two lengths, and names come from
/// strangers too.
const MAX_BYTES: usize = 100;

/// The candidate nearest to `name`, where one is near enough to be what was meant.
pub(crate) fn nearest<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    if name.len() > MAX_BYTES {
        return None;
    }
    let name = name.to_lowercase();
    candidates
        .into_iter()
        .filter(|candidate| candidate.len() <= MAX_BYTES)
        .map(|candidate| (strsim::damerau_levenshtein(&name, &candidate.to_lowercase()), candidate))
        .min()
        .filter(|(distance, candidate)| *distance <= 1 + candidate.chars().count().max(name.chars().count()) / 3)
        .map(|(_, candidate)| candidate)
}

/// The end of a message: `; did you mean "x"?`, or nothing where no candidate is near.
#[must_use]
pub fn hint<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>) -> String {
    nearest(name, candidates).map(|nearest| format!("; did you mean {nearest:?}?")).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(name: &str, expect: Option<&str>) {
        assert_eq!(nearest(name, ["target", "nums", "solution"]), expect, "{name}");
    }

    #[test]
    fn near_names_are_found_and_far_ones_are_not() {
        check("targets", Some("target"));
        check("Nums", Some("nums"));
        check("num", Some("nums"));
        check("solutoin", Some("solution"));
        check("question", None);
        check("", None);
    }

    #[test]
    fn texts_that_are_no_names_are_not_compared() {
        let [long, longer] = [1_000_000, 1_000_001].map(|len| "x".repeat(len));
        assert_eq!(nearest(&long, [longer.as_str(), "x"]), None);
        assert_eq!(nearest("xx", [longer.as_str(), "x"]), Some("x"));
    }
}

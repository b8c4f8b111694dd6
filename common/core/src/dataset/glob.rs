//! Wildcards in the file names of data cards.

/// Whether a path with `/` between its names is one that `pattern` means: `*` and `?` stand for characters of a name, and
/// `**` for any number of folders.
pub(super) fn matches(pattern: &str, path: &str) -> bool {
    let pattern = pattern.strip_prefix("./").unwrap_or(pattern);
    let (pattern, path): (Vec<&str>, Vec<&str>) = (pattern.split('/').collect(), path.split('/').collect());
    matches_with(&pattern, &path, |part| *part == "**", |part, name| name_matches(part, name))
}

fn name_matches(pattern: &str, name: &str) -> bool {
    let (pattern, name): (Vec<char>, Vec<char>) = (pattern.chars().collect(), name.chars().collect());
    matches_with(&pattern, &name, |char| *char == '*', |part, char| *part == '?' || part == char)
}

/// Whether `items` are what `pattern` means, whose stars stand for any number of items. Going back to the last star alone
/// is enough, and takes no more than the product of the lengths.
fn matches_with<T>(pattern: &[T], items: &[T], is_star: impl Fn(&T) -> bool, is_one: impl Fn(&T, &T) -> bool) -> bool {
    let (mut at, mut next) = (0, 0);
    // Behind the last star, and the first item that it does not stand for.
    let mut retry: Option<(usize, usize)> = None;
    while next < items.len() {
        if pattern.get(at).is_some_and(&is_star) {
            at += 1;
            retry = Some((at, next));
        } else if pattern.get(at).is_some_and(|part| is_one(part, &items[next])) {
            (at, next) = (at + 1, next + 1);
        } else if let Some((behind, item)) = retry {
            (at, next) = (behind, item + 1);
            retry = Some((behind, next));
        } else {
            return false;
        }
    }
    pattern[at..].iter().all(is_star)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(pattern: &str, matching: &[&str], others: &[&str]) {
        for path in matching {
            assert!(matches(pattern, path), "{pattern} {path}");
        }
        for path in others {
            assert!(!matches(pattern, path), "{pattern} {path}");
        }
    }

    #[test]
    fn stars_stay_in_a_name_and_double_stars_do_not() {
        check("data/train-*", &["data/train-0.parquet", "data/train-"], &["data/x/train-0", "train-0", "data/test-0"]);
        check("./*.csv", &["a.csv", ".csv"], &["a/b.csv", "a.csv.gz"]);
        check("**/train*.jsonl", &["train.jsonl", "a/b/train1.jsonl"], &["a/test.jsonl"]);
        check("**", &["a", "a/b"], &[]);
        check("a/**/b", &["a/b", "a/x/b", "a/x/y/b"], &["a/x", "b"]);
        check("a?c*e", &["abcde", "abce", "aéce"], &["ace", "abcd"]);
        check("../x", &[], &["x", "a/x"]);
        let (stars, long) = ("*a".repeat(2000) + "b", "a".repeat(4000));
        check(&stars, &[], &[long.as_str()]);
    }
}

//! What LaTeX's commands, words and characters are to a reader of answers.

/// Commands that are a sign.
pub(super) fn sign_of_command(name: &str) -> Option<char> {
    Some(match name {
        "cdot" | "times" | "ast" => '*',
        "div" => '/',
        "colon" => ':',
        "pm" | "mp" => '±',
        "le" | "leq" | "leqslant" => '≤',
        "ge" | "geq" | "geqslant" => '≥',
        "lt" => '<',
        "gt" => '>',
        "ne" | "neq" => '≠',
        "in" => '∈',
        "cup" => '∪',
        "approx" | "simeq" => '≈',
        "lvert" | "rvert" | "vert" | "mid" | "|" => '|',
        "langle" => '(',
        "rangle" => ')',
        "lbrack" => '[',
        "rbrack" => ']',
        "%" => '%',
        _ => return None,
    })
}

/// Characters beyond ASCII that are a sign.
pub(super) fn sign_of_character(character: char) -> Option<char> {
    Some(match character {
        '×' | '·' | '⋅' | '∗' => '*',
        '÷' => '/',
        '−' | '–' => '-',
        '≤' | '≥' | '≠' | '≈' | '±' | '∪' | '∈' => character,
        _ => return None,
    })
}

/// Characters that have a command.
pub(super) fn command_of_character(character: char) -> Option<&'static str> {
    Some(match character {
        '√' => "sqrt",
        'π' => "pi",
        'θ' => "theta",
        '∞' => "infty",
        _ => return None,
    })
}

/// The name of what has several.
pub(super) fn canonical(name: &str) -> &str {
    match name {
        "dfrac" | "tfrac" | "cfrac" => "frac",
        "dbinom" | "tbinom" => "binom",
        "lbrace" => "{",
        "rbrace" => "}",
        "infinity" | "inf" | "oo" => "infty",
        _ => name,
    }
}

/// Commands that say how something looks, or that are a space.
pub(super) fn is_skipped(name: &str) -> bool {
    const SIZES: &[&str] = &["left", "right", "big", "Big", "bigg", "Bigg", "bigl", "bigr", "Bigl", "Bigr"];
    const STYLES: &[&str] =
        &["displaystyle", "textstyle", "limits", "mathbf", "boldsymbol", "mathit", "mathbb", "mathcal"];
    const OTHERS: &[&str] = &["vec", "boxed", "fbox", "degree", "circ"];
    const CHARACTERS: &str = "!,;: ()[]$#_&";
    [SIZES, STYLES, OTHERS].iter().any(|names| names.contains(&name)) || name.len() == 1 && CHARACTERS.contains(name)
}

/// Commands whose group is words.
pub(super) fn is_text(name: &str) -> bool {
    let texts = ["textbf", "textit", "textrm", "textnormal", "textup", "textsf", "mathrm", "mathsf", "operatorname"];
    matches!(name, "text" | "mbox" | "hbox" | "rm") || texts.contains(&name)
}

/// Words that are commands without their backslash.
pub(super) fn is_command_word(word: &str) -> bool {
    matches!(word, "sqrt" | "pi" | "infty") || super::function::named(word).is_some()
}

pub(super) fn is_percent(word: &str) -> bool {
    matches!(word, "percent" | "percentage" | "pct")
}

//! The reward `language_consistency`: DeepSeek-R1's (arXiv 2501.12948, section 2.3.2) takes the share of the thought's words
//! that are in the target language. Here it is the share of letters in the scripts that the language is written in, which
//! needs no dictionary, and therefore
//! - cannot tell languages of one script apart, as English and German, or Chinese from a Japanese text all in Han,
//! - counts the letters of formulas, which are Latin and Greek, for or against as any other.

use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};

use super::{Answer, Judge, Outcome};
use crate::dataset::Row;

/// The share of the letters before `</think>`, or of all where there is none, that the language is written in.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct LanguageConsistency {
    language: Language,
}

/// By ISO 639-1 code.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Language {
    Ar,
    De,
    El,
    #[default]
    En,
    Es,
    Fa,
    Fr,
    He,
    Hi,
    It,
    Ja,
    Ko,
    Pt,
    Ru,
    Th,
    Tr,
    Uk,
    Vi,
    Zh,
}

type Script = &'static [RangeInclusive<char>];

/// Blocks of Unicode; what in them is no letter is not looked at.
const LATIN: Script = &[
    '\u{41}'..='\u{24f}',
    '\u{1e00}'..='\u{1eff}',
    '\u{2c60}'..='\u{2c7f}',
    '\u{a720}'..='\u{a7ff}',
    '\u{ab30}'..='\u{ab6f}',
    '\u{fb00}'..='\u{fb06}',
    '\u{ff21}'..='\u{ff5a}',
];
const GREEK: Script = &['\u{370}'..='\u{3ff}', '\u{1f00}'..='\u{1fff}'];
const CYRILLIC: Script =
    &['\u{400}'..='\u{52f}', '\u{1c80}'..='\u{1c8f}', '\u{2de0}'..='\u{2dff}', '\u{a640}'..='\u{a69f}'];
const HEBREW: Script = &['\u{590}'..='\u{5ff}', '\u{fb1d}'..='\u{fb4f}'];
const ARABIC: Script = &[
    '\u{600}'..='\u{6ff}',
    '\u{750}'..='\u{77f}',
    '\u{870}'..='\u{8ff}',
    '\u{fb50}'..='\u{fdff}',
    '\u{fe70}'..='\u{fefe}',
];
const DEVANAGARI: Script = &['\u{900}'..='\u{97f}', '\u{a8e0}'..='\u{a8ff}'];
const THAI: Script = &['\u{e00}'..='\u{e7f}'];
const HANGUL: Script = &[
    '\u{1100}'..='\u{11ff}',
    '\u{3130}'..='\u{318f}',
    '\u{a960}'..='\u{a97f}',
    '\u{ac00}'..='\u{d7ff}',
    '\u{ffa0}'..='\u{ffdc}',
];
const HAN: Script = &[
    '\u{2e80}'..='\u{2fdf}',
    '\u{3005}'..='\u{3007}',
    '\u{3021}'..='\u{3029}',
    '\u{3038}'..='\u{303b}',
    '\u{3400}'..='\u{4dbf}',
    '\u{4e00}'..='\u{9fff}',
    '\u{f900}'..='\u{faff}',
    '\u{20000}'..='\u{3ffff}',
];
const KANA: Script = &[
    '\u{3031}'..='\u{3035}',
    '\u{3040}'..='\u{30ff}',
    '\u{31f0}'..='\u{31ff}',
    '\u{ff66}'..='\u{ff9f}',
    '\u{1aff0}'..='\u{1b16f}',
];

impl Language {
    fn scripts(self) -> &'static [Script] {
        match self {
            Self::De | Self::En | Self::Es | Self::Fr | Self::It | Self::Pt | Self::Tr | Self::Vi => &[LATIN],
            Self::El => &[GREEK],
            Self::Ru | Self::Uk => &[CYRILLIC],
            Self::He => &[HEBREW],
            Self::Ar | Self::Fa => &[ARABIC],
            Self::Hi => &[DEVANAGARI],
            Self::Th => &[THAI],
            Self::Ko => &[HANGUL],
            Self::Zh => &[HAN],
            Self::Ja => &[HAN, KANA],
        }
    }
}

impl Judge for LanguageConsistency {
    fn judge(&self, answer: &Answer<'_>, _: &Row) -> Outcome {
        let thought = answer.text.split("</think>").next().unwrap_or_default();
        let thought = thought.strip_prefix("<think>").unwrap_or(thought);
        let (mut letters, mut of_language) = (0_usize, 0_usize);
        for letter in thought.chars().filter(|c| c.is_alphabetic()) {
            letters += 1;
            let is_of = |script: &Script| script.iter().any(|block| block.contains(&letter));
            of_language += usize::from(self.language.scripts().iter().any(is_of));
        }
        if letters == 0 {
            return Outcome::Unparsable;
        }
        Outcome::Score((of_language as f64 / letters as f64) as f32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(language: &str, completion: &str, expect: Outcome) {
        let language = serde_json::from_value(language.into()).unwrap();
        let outcome = LanguageConsistency { language }.judge(&Answer::of(completion), &Row::new());
        assert_eq!(outcome, expect, "{completion:?}");
    }

    /// The first article of the Universal Declaration of Human Rights, its beginning.
    #[test]
    fn a_text_is_in_its_own_language_and_in_no_other_script() {
        let texts = [
            ("en", "All human beings are born free and equal in dignity and rights."),
            ("de", "Alle Menschen sind frei und gleich an Würde und Rechten geboren."),
            ("vi", "Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm và quyền."),
            ("ru", "Все люди рождаются свободными и равными в своем достоинстве и правах."),
            ("uk", "Всі люди народжуються вільними і рівними у своїй гідності та правах, її ґрунт."),
            ("el", "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα."),
            ("he", "כל בני האדם נולדו בני חורין ושווים בערכם ובזכויותיהם."),
            ("ar", "يولد جميع الناس أحرارًا متساوين في الكرامة والحقوق."),
            ("hi", "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।"),
            ("th", "มนุษย์ทั้งปวงเกิดมามีอิสระและเสมอภาคกันในศักดิ์ศรีและสิทธิ"),
            ("ko", "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다."),
            ("zh", "人人生而自由，在尊严和权利上一律平等。"),
            ("ja", "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。"),
        ];
        let scripts = |language: &str| serde_json::from_value::<Language>(language.into()).unwrap().scripts();
        for (written, text) in texts {
            check(written, &format!("<think>1. {text} = 42</think> any Ответ 答案"), Outcome::Score(1.0));
            let others = texts.iter().filter(|(other, _)| scripts(other) != scripts(written));
            for (other, _) in others.filter(|(other, _)| !matches!((*other, written), ("ja", "zh") | ("zh", "ja"))) {
                check(other, text, Outcome::Score(0.0));
            }
        }
    }

    #[test]
    fn letters_of_other_scripts_lower_the_share() {
        check("en", "so 答案 is", Outcome::Score(4.0 / 6.0));
        check("zh", "so 答案 is", Outcome::Score(2.0 / 6.0));
        check("ja", "答えは x", Outcome::Score(3.0 / 4.0));
        check("zh", "答えは", Outcome::Score(1.0 / 3.0));
        check("ru", "<think>да", Outcome::Score(1.0));
    }

    #[test]
    fn without_letters_there_is_nothing_to_judge() {
        check("en", "1 + 2 = 3</think>three", Outcome::Unparsable);
    }
}

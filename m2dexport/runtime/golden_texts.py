"""The golden texts, and the corpus whose order is a golden one, too."""

from __future__ import annotations

from m2dexport.runtime.encoder import Encoder

#: What tokenizers and exporters differ on.
TEXTS: tuple[str, ...] = (
    "",
    " \t\n ",
    "a",
    "A man is playing a guitar.",
    "Naïve café in São Paulo, Ångström & Über!",
    "😀 👩‍👩‍👧 🇨🇭 🎉",
    "今日は良い天気ですね。你好，世界。안녕하세요",
    "Привет, как дела? مرحبا بالعالم",
    "שלום עולם، كيف حالك اليوم؟",
    "http://example.org/a?b=c&d=%20 3.14159e-10\tFOO_bar",
)
#: A few documents and the queries that find them.
DOCUMENTS: tuple[str, ...] = (
    "The recipe needs two eggs, a cup of flour and a pinch of salt.",
    "Our train to Zurich leaves at seven in the morning from platform four.",
    "The patient was given antibiotics against the infection.",
    "She scored the winning goal in the last minute of the match.",
    "The central bank raised interest rates to slow inflation.",
    "A telescope in orbit took pictures of a distant galaxy.",
    "To reset your password, follow the link in the email.",
    "Heavy rain flooded the streets of the old town last night.",
    "Der Hund schläft unter dem Tisch in der Küche.",
    "Le musée est fermé le lundi et les jours fériés.",
    "El concierto de guitarra empieza a las nueve de la noche.",
    "图书馆星期天不开门。",
)
QUERIES: tuple[str, ...] = (
    "How do I change my password?",
    "weather and flooding in the city",
    "Wann fährt der Zug nach Zürich?",
    "guitar music tonight",
)


def overlong_text(max_length: int) -> str:
    """Return a text of four times the maximum length, in tokens, or a little more."""
    return "a long text " * (4 * max_length // 3 + 1)


def long_texts(encoder: Encoder, prompt: str | None) -> list[str]:
    """Return texts of four times the maximum length, exactly it, and one token less.

    Only the first where no text is found to fit exactly: the prompt leaves no room, or no word
    adds one token.
    """
    longest = encoder.spec.max_length
    texts = [overlong_text(longest)]
    for word in ("a", "1", "the"):
        one, two = (len(ids) for ids in encoder.tokenize([word, f"{word} {word}"], prompt=prompt))
        count = longest - one + 1  # words of an exact fit, when each further one is one token
        exact, under = (" ".join([word] * max(n, 0)) for n in (count, count - 1))
        lengths = [len(ids) for ids in encoder.tokenize([exact, under], prompt=prompt)]
        if two == one + 1 and count > 1 and lengths == [longest, longest - 1]:
            return [*texts, exact, under]
    return texts

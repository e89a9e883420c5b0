"""Colors, type and spacing of the page. Fonts come with gradio; nothing is fetched."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

CSS = Path(__file__).parent / "assets" / "style.css"
# Until the page has settled: gradio mounts the sidebar open, which on a phone hides everything else.
HEAD = "<style>@media (max-width: 768px) { body:not(.lm-settled) .sidebar { visibility: hidden; } }</style>"

PETROL = gr.themes.Color(
    c50="#eefafa", c100="#d3f0f0", c200="#a9e0e1", c300="#74c9cc", c400="#3fabb0", c500="#1d8d94", c600="#0d6f78",
    c700="#0b5a63", c800="#0c4a52", c900="#0b3c43", c950="#05262b", name="petrol",
)  # fmt: skip
SLATE = gr.themes.Color(
    c50="#f6f8f8", c100="#eef2f2", c200="#dfe6e6", c300="#c6d1d1", c400="#94a3a4", c500="#667577", c600="#4a5a5c",
    c700="#2d3a3c", c800="#1b2526", c900="#121a1b", c950="#0c1213", name="slate",
)  # fmt: skip


def theme() -> gr.themes.Base:
    """A calm instrument panel: petrol on cool grey, ruled rather than boxed."""
    return gr.themes.Base(
        primary_hue=PETROL,
        secondary_hue=PETROL,
        neutral_hue=SLATE,
        radius_size=gr.themes.sizes.radius_md,
        font=[gr.themes.LocalFont("IBM Plex Sans", weights=(400, 700)), "system-ui", "sans-serif"],
        font_mono=[gr.themes.LocalFont("IBM Plex Mono", weights=(400,)), "ui-monospace", "monospace"],
    ).set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        body_text_color="#17211f",
        body_text_color_dark="#e5eceb",
        body_text_color_subdued="*neutral_500",
        body_text_color_subdued_dark="*neutral_400",
        background_fill_primary="#ffffff",
        background_fill_primary_dark="*neutral_900",
        background_fill_secondary="#ffffff",
        background_fill_secondary_dark="*neutral_900",
        border_color_primary="*neutral_200",
        border_color_primary_dark="*neutral_700",
        block_background_fill="transparent",
        block_background_fill_dark="transparent",
        block_border_width="0px",
        block_shadow="none",
        block_shadow_dark="none",
        block_padding="0px",
        block_label_background_fill="transparent",
        block_label_background_fill_dark="transparent",
        block_label_border_width="0px",
        block_label_text_color="*neutral_600",
        block_label_text_color_dark="*neutral_300",
        block_label_text_weight="600",
        block_title_text_color="*body_text_color",
        block_title_text_weight="600",
        block_title_text_size="13.5px",
        block_info_text_color="*body_text_color_subdued",
        block_info_text_size="12.5px",
        panel_border_width="0px",
        input_background_fill="#ffffff",
        input_background_fill_dark="*neutral_950",
        input_border_width="1px",
        input_border_color="*neutral_300",
        input_border_color_dark="*neutral_700",
        input_border_color_focus="*primary_600",
        input_border_color_focus_dark="*primary_400",
        input_shadow="none",
        input_shadow_dark="none",
        input_shadow_focus="none",
        input_shadow_focus_dark="none",
        slider_color="*primary_600",
        slider_color_dark="*primary_400",
        color_accent="*primary_600",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_300",
        button_primary_background_fill_hover_dark="*primary_200",
        button_primary_text_color="#ffffff",
        button_primary_text_color_dark="#05262b",
        button_secondary_background_fill="transparent",
        button_secondary_background_fill_dark="transparent",
        button_secondary_background_fill_hover="*neutral_100",
        button_secondary_background_fill_hover_dark="*neutral_800",
        button_secondary_border_color="*neutral_300",
        button_secondary_border_color_dark="*neutral_700",
        button_border_width="1px",
        button_primary_border_color="transparent",
        button_primary_border_color_dark="transparent",
        button_large_text_weight="600",
        button_small_text_weight="600",
        checkbox_background_color_selected="*primary_600",
        checkbox_background_color_selected_dark="*primary_400",
        checkbox_border_color_selected="*primary_600",
        checkbox_border_color_selected_dark="*primary_400",
        checkbox_label_background_fill="transparent",
        checkbox_label_background_fill_dark="transparent",
        checkbox_label_border_width="0px",
    )

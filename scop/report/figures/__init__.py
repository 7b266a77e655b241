"""What the plots of results show: series, axes, colours and order.

The HTML page (Plotly) and the PNG files (matplotlib) draw the same figures; this package decides their content.
"""
